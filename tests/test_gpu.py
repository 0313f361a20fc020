"""What needs a GPU: half precisions, the loss scale, the same noise as on the CPU. Skipped where there is none."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fdfo.config import PRESETS, SampleConfig, TrainConfig
from fdfo.distributed import Job
from fdfo.model import FlowModel
from fdfo.preparation import Run, prepare
from fdfo.rollout import Rollout, encode_prompts, sample_share, score_share
from fdfo.trainer import train
from fdfo.update import accumulate_gradient, step_samples

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


def small(folder: Path, **changes) -> TrainConfig:
    quick = dict(
        sample=SampleConfig(num_solver_steps=6, resolution=64), total_pairs_per_epoch=16, num_epochs=2, heldout_prompt_set=None,
        runs_dir=folder,
    )  # fmt: skip
    return dataclasses.replace(PRESETS["tiny"], **(quick | changes))


def rollout_of(job: Job, config: TrainConfig) -> tuple[Run, Rollout]:
    run = prepare(job, config, None)
    prompts = run.prompts[: config.total_pairs_per_epoch]
    text, empty = encode_prompts(run.model, prompts, config)
    return run, sample_share(run.model, config, run.plan, 0, range(len(prompts)), prompts, text, empty)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_every_precision_trains(tmp_path: Path, precision: str):
    run = train(Job(0, 1, GPU), small(tmp_path, precision=precision, memory_efficient=True), None)
    assert run.progress.epochs == 2 and all(p.isfinite().all() for p in run.model.trainable())


def test_gpu_and_cpu_sample_the_same_pairs(tmp_path: Path):
    _, on_gpu = rollout_of(Job(0, 1, GPU), small(tmp_path / "gpu"))
    _, on_cpu = rollout_of(Job(0, 1, torch.device("cpu")), small(tmp_path / "cpu"))
    assert torch.equal(on_gpu.xs[::2, 0].cpu(), on_cpu.xs[::2, 0]) or torch.allclose(
        on_gpu.xs[:, 0].cpu(), on_cpu.xs[:, 0], atol=1e-6
    )
    torch.testing.assert_close(on_gpu.final.cpu(), on_cpu.final, rtol=0, atol=2e-2)


def test_float16_gradient_is_that_of_float32(tmp_path: Path):
    """One rollout, sampled in float16; its gradient in float16 with the loss scale, and in float32."""
    config = small(tmp_path, precision="fp16")
    run, rollout = rollout_of(Job(0, 1, GPU), config)
    differences = score_share(rollout, run.model.decode(rollout.final), run.reward)
    samples, total = step_samples(run.plan, config, 0, range(16))[0]

    def gradient(model: FlowModel, scale: float) -> torch.Tensor:
        accumulate_gradient(model, config, run.plan, rollout, differences, None, samples, total, scale)
        return torch.cat([p.grad.flatten() for p in model.trainable()]) / scale

    half = gradient(run.model, 2.0**16)
    exact = FlowModel("tiny", "fp32", GPU)
    exact.add_lora(32, 64, config.seed)
    exact.to_device()
    rollout.text = exact.encode(rollout.prompts)
    single = gradient(exact, 1.0)
    error = ((half - single).norm() / single.norm()).item()
    print(f"relative error of the float16 gradient: {error:.4f}")
    assert half.isfinite().all() and error < 0.1
