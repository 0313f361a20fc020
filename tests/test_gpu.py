"""What needs a GPU: half precisions, the loss scale, the same noise as on the CPU. Skipped where there is none."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fdfo.config import PRESETS, SampleConfig, TrainConfig
from fdfo.distributed import Job
from fdfo.memory import fitting_plan
from fdfo.model import FlowModel
from fdfo.preparation import Run, prepare
from fdfo.rollout import Rollout, encode_prompts, sample_share, score_share
from fdfo.trainer import train
from fdfo.update import accumulate_gradient, step_samples

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


def small(folder: Path, **changes) -> TrainConfig:
    quick = dict(
        sample=SampleConfig(num_solver_steps=6, resolution=64), total_pairs_per_epoch=16, num_epochs=2, eval_prompts=0,
        runs_dir=folder,
    )  # fmt: skip
    return dataclasses.replace(PRESETS["tiny"], **(quick | changes))


def rollout_of(job: Job, config: TrainConfig) -> tuple[Run, Rollout]:
    run = prepare(job, config, None)
    prompts = run.prompts[: config.total_pairs_per_epoch]
    text, empty = encode_prompts(run.model, prompts, config)
    return run, sample_share(run.model, config, run.plan, 0, range(len(prompts)), prompts, text, empty)


@pytest.mark.parametrize("precision,compile", [("fp16", True), ("fp16", False), ("bf16", True), ("fp32", False)])
def test_every_precision_trains(tmp_path: Path, precision: str, compile: bool):
    """Compiled, the ratio at unchanged weights is 1 to the bit: sampling runs the training graph."""
    run = train(Job(0, 1, GPU), small(tmp_path, precision=precision, compile=compile, memory_efficient=True), None)
    assert run.progress.epochs == 2 and all(p.isfinite().all() for p in run.model.trainable())
    assert (run.model.compiled_rows is not None) == compile
    steps = [json.loads(line) for line in run.log.path.read_text().splitlines() if '"step"' in line]
    assert steps[0]["ratio_first"] == 1.0 or not compile


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
    rollout.xs = rollout.xs.float()
    single = gradient(exact, 1.0)
    error = ((half - single).norm() / single.norm()).item()
    print(f"relative error of the float16 gradient: {error:.4f}")
    assert half.isfinite().all() and error < 0.1


def test_micro_batches_that_do_not_fit_are_made_smaller_and_the_numbers_stay(tmp_path: Path, capsys):
    """A limit on the memory of this process stands for a small GPU."""
    job, config = Job(0, 1, GPU), small(tmp_path, total_pairs_per_epoch=256, max_batch_size=4096)
    run = prepare(job, config, None)
    used = torch.cuda.memory_reserved(GPU) + 2**29
    torch.cuda.set_per_process_memory_fraction(used / torch.cuda.get_device_properties(GPU).total_memory)
    try:
        plan = fitting_plan(job, config, run.model, run.plan)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert plan.train_batch < run.plan.train_batch and (plan.samples, plan.pairs) == (run.plan.samples, run.plan.pairs)
    assert "going on as with --max-batch-size" in capsys.readouterr().out
    assert all(parameter.grad is None for parameter in run.model.trainable())
