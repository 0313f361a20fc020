"""What needs a GPU: half precisions, the loss scale, the same noise as on the CPU. Skipped where there is none."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tiny_qwen import save_tiny_qwen

from fdfo.config.plan import plan_batches
from fdfo.config.presets import PRESETS
from fdfo.config.train_options import SampleConfig, TrainConfig
from fdfo.distributed.job import Job
from fdfo.distributed.machine import StageClock
from fdfo.method.prepare import Run, prepare
from fdfo.method.rollout import PairShare, Rollout, sample_share, score_share
from fdfo.method.trainer import train
from fdfo.method.update import EpochData, accumulate_gradient, step_samples
from fdfo.model.acceleration import PinnedWeights
from fdfo.model.flow_model import FlowModel
from fdfo.model.memory import expected_memory, fits, fitting_plan
from fdfo.run_folder.start import FRESH
from rewards.scorers.clip import ClipScorer
from rewards.vlm.judge import MAX_BATCH, QUESTIONS, Vlm, VlmScorer

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


def small(folder: Path, **changes) -> TrainConfig:
    quick = dict(
        sample=SampleConfig(num_solver_steps=6, resolution=64), total_pairs_per_epoch=16, num_epochs=2, eval_prompts=0,
        runs_dir=folder,
    )  # fmt: skip
    return dataclasses.replace(PRESETS["tiny-published"], **(quick | changes))


def rollout_of(job: Job, config: TrainConfig) -> tuple[Run, Rollout]:
    run = prepare(job, config, FRESH)
    prompts = run.prompts[: config.total_pairs_per_epoch]
    share = PairShare(0, range(len(prompts)), prompts, *run.model.encode_prompts(prompts, config.sample.guidance_scale))
    return run, sample_share(run.model, config, run.plan, share)


@pytest.mark.parametrize("precision,compile", [("fp16", True), ("fp16", False), ("bf16", True), ("fp32", False)])
def test_every_precision_trains(tmp_path: Path, precision: str, compile: bool):
    """Compiled, the ratio at unchanged weights is 1 to the bit: sampling runs the training graph."""
    run = train(Job(0, 1, GPU), small(tmp_path, precision=precision, compile=compile, memory_efficient=True))
    assert run.progress.epochs == 2 and all(p.isfinite().all() for p in run.model.trainable())
    assert (run.model.compiled_rows is not None) == compile
    steps = [json.loads(line) for line in run.log.path.read_text().splitlines() if '"step"' in line]
    assert steps[0]["ratio_first"] == 1.0 or not compile


def test_gpu_and_cpu_sample_the_same_pairs(tmp_path: Path):
    _, on_gpu = rollout_of(Job(0, 1, GPU), small(tmp_path / "gpu"))
    _, on_cpu = rollout_of(Job(0, 1, torch.device("cpu")), small(tmp_path / "cpu"))
    first = on_cpu.samples.step == 0
    torch.testing.assert_close(on_gpu.xs.cpu()[first], on_cpu.xs[first], rtol=0, atol=1e-6)
    torch.testing.assert_close(on_gpu.final.cpu(), on_cpu.final, rtol=0, atol=2e-2)


def test_float16_gradient_is_that_of_float32(tmp_path: Path):
    """One rollout, sampled in float16; its gradient in float16 with the loss scale, and in float32."""
    config = small(tmp_path, precision="fp16")
    run, rollout = rollout_of(Job(0, 1, GPU), config)
    differences = score_share(rollout, run.model.decode(rollout.final), run.judges.reward)
    samples = step_samples(run.plan, config, 0, range(16))[0]

    def gradient(model: FlowModel, scale: float) -> torch.Tensor:
        accumulate_gradient(EpochData(model, config, run.plan, rollout, differences), samples, scale, lambda done: False)
        return torch.cat([p.grad.flatten() for p in model.trainable()]) / scale

    half = gradient(run.model, 2.0**16)
    exact = FlowModel("tiny", "fp32", GPU)
    exact.add_lora(32, 64, config.seed)
    exact.to_device()
    rollout.share = dataclasses.replace(rollout.share, text=exact.encode(rollout.share.prompts))
    rollout.xs = rollout.xs.float()
    single = gradient(exact, 1.0)
    error = ((half - single).norm() / single.norm()).item()
    print(f"relative error of the float16 gradient: {error:.4f}")
    assert half.isfinite().all() and error < 0.1


def test_micro_batches_that_do_not_fit_are_made_smaller_and_the_numbers_stay(tmp_path: Path, capsys):
    """A limit on the memory of this process stands for a small GPU."""
    job, config = Job(0, 1, GPU), small(tmp_path, total_pairs_per_epoch=256, max_batch_size=4096)
    run = prepare(job, config, FRESH)
    used = torch.cuda.memory_reserved(GPU) + 2**29
    torch.cuda.set_per_process_memory_fraction(used / torch.cuda.get_device_properties(GPU).total_memory)
    try:
        plan = fitting_plan(job, config, run.model, run.plan)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert plan.train_batch < run.plan.train_batch and (plan.samples, plan.pairs) == (run.plan.samples, run.plan.pairs)
    assert "continuing with --max-batch-size" in capsys.readouterr().out
    told = expected_memory(job, config, run.model, plan)
    assert re.match(r"memory: at most \d+\.\d of the GPU's \d+\.\d GiB so far", told), told
    assert all(parameter.grad is None for parameter in run.model.trainable())


def seen_shapes(module: torch.nn.Module) -> set[torch.Size]:
    """A set that fills with the shapes of the token numbers that the module is called with."""
    shapes = set()
    module.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.add((kwargs.get("input_ids") if not args else args[0]).shape), with_kwargs=True
    )
    return shapes


def test_embeddings_do_not_depend_on_how_many_prompts_a_process_has():
    """To the bit, and the encoders see one shape whatever the number."""
    model = FlowModel("tiny", "fp16", GPU)
    model.to_device()
    shapes = [seen_shapes(encoder) for encoder in (model.pipe.text_encoder, model.pipe.text_encoder_3)]
    prompts = [f"a red ring on a blue background, {i} of them" for i in range(37)]
    whole, part = model.encode(prompts), model.encode(prompts[18:])
    assert torch.equal(whole.tokens[18:], part.tokens) and torch.equal(whole.pooled[18:], part.pooled)
    assert [len(seen) for seen in shapes] == [1, 1]


def test_the_judge_does_not_depend_on_how_many_pictures_a_process_has(tmp_path: Path):
    """To the bit, though the images' neighbours have captions of other lengths."""
    vlm = Vlm(str(save_tiny_qwen(tmp_path)), Job(0, 1, GPU))
    shapes = seen_shapes(vlm.model)
    captions = [f"caption {i} {'word ' * (i % 5 * 16)}" for i in range(37)]
    images = torch.rand(37, 3, 56, 56, generator=torch.Generator().manual_seed(0)).to(GPU)
    scorer = VlmScorer(vlm, QUESTIONS["vlm_alignment_train"], "training")
    scores = scorer.score(captions, images)
    assert torch.equal(scores[18:], scorer.score(captions[18:], images[18:]))
    assert torch.equal(scores[9:10], scorer.score(captions[9:10], images[9:10]))
    assert {rows for rows, _ in shapes} == {MAX_BATCH} and len(shapes) > 1


LITTLE = dict(gradient_checkpointing=True, offload_scorers=True, offload_trajectories=True, memory_efficient=True)


def epochs_in(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes) -> tuple[torch.Tensor, float, set[str], set[str]]:
    """Two epochs: the adapter, the ratio at unchanged weights, and where the scorer's weights were between stages and in calls."""
    between, inside, models = set(), set(), []
    stage, score, build = StageClock.stage, ClipScorer.score, ClipScorer.__init__

    def places() -> set[str]:
        return {p.device.type for model in models for p in model.parameters()}

    @contextlib.contextmanager
    def watched_stage(clock: StageClock, name: str):
        between.update(places())
        with stage(clock, name):
            yield
        between.update(places())

    def watched_score(scorer: ClipScorer, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        inside.update(places())
        return score(scorer, prompts, images)

    def watched_build(scorer: ClipScorer, *arguments: object) -> None:
        build(scorer, *arguments)
        models.append(scorer.model)

    with monkeypatch.context() as patch:
        patch.setattr(StageClock, "stage", watched_stage)
        patch.setattr(ClipScorer, "score", watched_score)
        patch.setattr(ClipScorer, "__init__", watched_build)
        run = train(Job(0, 1, GPU), small(folder, reward_specs=("scene=1.0", "scene_clip=0.5"), **changes))
    steps = [json.loads(line) for line in run.log.path.read_text().splitlines() if '"step"' in line]
    adapter = torch.cat([p.detach().flatten().cpu() for p in run.model.trainable()])
    return adapter, steps[0]["ratio_first"], between, inside


@pytest.mark.parametrize("precision,compile", [("fp16", True), ("fp16", False), ("fp32", False)])
def test_epochs_in_little_memory_are_the_default_ones(tmp_path: Path, monkeypatch, precision: str, compile: bool):
    kind = dict(precision=precision, compile=compile)
    plain, _, between, _ = epochs_in(tmp_path / "plain", monkeypatch, **kind)
    assert between == {"cuda"}
    little, ratio, between, inside = epochs_in(tmp_path / "little", monkeypatch, **kind, **LITTLE)
    assert between == {"cpu"} and inside == {"cuda"}
    assert ratio == 1.0 or not compile
    start = FlowModel("tiny", "fp32", torch.device("cpu"))
    start.add_lora(32, 64, 6)
    change = plain - torch.cat([p.detach().flatten() for p in start.trainable()])
    error = ((little - plain).norm() / change.norm()).item()
    print(f"adapter in little memory, {precision}, compiled {compile}: differs by {error:.2e} of its change")
    assert error < 0.02


def test_weights_wait_in_pinned_memory_and_come_for_a_call():
    module = torch.nn.Linear(8, 8).to(GPU)
    weight = module.weight.detach().cpu().clone()
    home = PinnedWeights([module], GPU)
    assert module.weight.is_pinned()
    with pytest.raises(ConnectionError), home.loaded():
        assert module.weight.device == GPU and torch.equal(module.weight.cpu(), weight)
        raise ConnectionError("the judge hung up")
    assert module.weight.is_pinned() and torch.equal(module.weight, weight)


def test_a_checkpointed_graph_keeps_little_memory():
    """Bytes that the graph of one forward holds on the GPU."""
    held = []
    for checkpointed in (False, True):
        model = FlowModel("tiny", "fp16", GPU)
        model.add_lora(32, 64, 0)
        model.to_device()
        if checkpointed:
            model.checkpoint_gradients()
        model.accelerate(None, 64)
        x, text = torch.randn(64, *model.latent_shape(64), device=GPU), model.encode(["a red ring on a blue background"] * 64)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(GPU)
        v = model.velocity(x, x.new_full((64,), 0.5), text, None, 1.0)
        held.append(torch.cuda.memory_allocated(GPU) - before)
        v.float().square().mean().backward()
    print(f"bytes held by the graph of 64 rows: {held}")
    assert held[1] < held[0] / 3


def test_the_trial_leaves_trajectories_in_host_memory_out(tmp_path: Path):
    """Trajectories of 4 GiB, and a limit of 2 GiB on this process."""
    job, config = Job(0, 1, GPU), small(tmp_path, total_pairs_per_epoch=2048, max_batch_size=16, offload_trajectories=True)
    run = prepare(job, config, FRESH)
    shape = run.model.latent_shape(64)
    steps = 4 * 2**30 // (2 * 2 * 2048 * shape[0] * shape[1] * shape[2] * 4)
    config = dataclasses.replace(config, sample=SampleConfig(num_solver_steps=steps, resolution=64))
    plan = plan_batches(config, 1)
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved(GPU) + 2 * 2**30
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(GPU).total_memory)
    try:
        assert fits(job, config, run.model, plan)
        assert not fits(job, dataclasses.replace(config, offload_trajectories=False), run.model, plan)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


COMPILED = """
import sys, torch
from fdfo.model.flow_model import FlowModel
device = torch.device("cuda", 0)
model = FlowModel("tiny", "fp16", device)
model.add_lora(32, 64, 0)
model.to_device()
assert model.accelerate(4, 64) is None
generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    for parameter in model.trainable():
        parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
x = torch.randn(4, *model.latent_shape(64), generator=generator).to(device)
v = model.velocity(x, x.new_full((4,), 0.5), model.encode(["a red ring on a blue background"] * 4), None, 1.0)
v.float().square().sum().backward()
gradient = torch.cat([parameter.grad.flatten() for parameter in model.trainable()])
torch.save({"velocity": v.detach().cpu(), "image": model.decode(x).cpu(), "gradient": gradient.cpu()}, sys.argv[1])
"""


def test_the_clock_does_not_choose_how_compiled_blocks_round(tmp_path: Path):
    """Two processes compile for themselves, one with the compiler's timings turned upside down: velocity and image are equal to
    the bit. The attention's backward may add in any order."""
    if "deterministic" not in torch._inductor.list_options():
        pytest.skip("PyTorch 2.9 has no deterministic mode of its compiler")
    started = []
    for name, distortion in (("plain", ""), ("inverse", "inverse")):
        own = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / name), "TORCHINDUCTOR_DISTORT_BENCHMARKING_RESULT": distortion}
        command = [sys.executable, "-c", COMPILED, str(tmp_path / f"{name}.pt")]
        started.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | own))
    assert [process.wait() for process in started] == [0, 0]
    plain, inverse = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("plain", "inverse"))
    assert torch.equal(plain["velocity"], inverse["velocity"]) and torch.equal(plain["image"], inverse["image"])
    assert (plain["gradient"] - inverse["gradient"]).norm() < 1e-3 * plain["gradient"].norm()
