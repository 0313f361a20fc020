"""One rank's share of an 8-GPU epoch at full size with random weights, through train.py's own stages: fast, or the published way.

python benchmarks/random_hub.py --out /dev/shm/random_hub
export HF_HOME=/dev/shm/random_hub HF_HUB_OFFLINE=1
python benchmarks/full_size.py --out fast.json
python benchmarks/full_size.py --eager --out eager.json

The whole epoch (432 pairs) is 8 times the default 54 pairs. --eager runs the same stages without compiling, with frozen
weights in bfloat16 under autocast, diffusers' attention with PEFT's layers, the library's vision attention, and that loop's
batch sizes. Both include what is done once an epoch: encoding the prompts, with the text encoders brought from the host.

The preset that trains on a subset, or any other subset:

python benchmarks/full_size.py --preset sd35-medium-fast --out subset.json
python benchmarks/full_size.py --preset sd35-medium-fast --steps-per-trajectory 10 --max-batch-size 26 --out subset.json

Two GPUs, and one with the same pairs in all; precision.py says how far apart the gradients are, and what they came from:

torchrun --nproc_per_node=2 benchmarks/full_size.py --pairs 27 --gradient two.pt --out two.json
python benchmarks/full_size.py --pairs 54 --gradient one.pt --out one.json
python benchmarks/precision.py --compare one.pt two.pt

With --one-gpu two processes share a GPU, for the gradient where there is no second one; their seconds mean nothing.

The preset for one GPU of 24 GB, all 432 pairs, on a GPU that lets this process have no more than 23 GB:

python benchmarks/random_hub.py --parts sd35 clip vlm --vlm qwenvl-3b --out /dev/shm/random_hub
python benchmarks/full_size.py --preset sd35-medium-24gb --pairs 432 --solver-steps 5 --gpu-gb 23 --out small.json

Other base models, as their presets have them (for a small GPU), and with all that a large GPU has room for:

python benchmarks/random_hub.py --parts flux2-klein pickscore --out /dev/shm/random_hub
python benchmarks/full_size.py --preset flux2-klein --reward-preset pickscore --out klein_small.json
python benchmarks/full_size.py --preset flux2-klein --reward-preset pickscore --roomy --max-batch-size 12 --out klein.json

With few solver steps an epoch takes minutes. Of a whole epoch only trajectories are then missing, and ballast of their size
takes their place where they would lie: the epoch's, and on the GPU those of one micro-batch of sampling. Seconds of sampling and
update are also given as the preset's steps would take. Peaks are by stage; "start" is loading, compiling and the trial before the first epoch.
"""

import contextlib
import dataclasses
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import diffusers
import torch
import torch.distributed as dist
import tyro
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import fdfo.method.prepare  # noqa: E402
import fdfo.method.trainer  # noqa: E402
import fdfo.method.update  # noqa: E402
import fdfo.model.flow_model  # noqa: E402
import rewards.vlm.judge  # noqa: E402
from fdfo.config.options import to_dict  # noqa: E402
from fdfo.config.plan import plan_batches, plan_subset  # noqa: E402
from fdfo.config.presets import PRESETS
from fdfo.config.train_options import TrainConfig  # noqa: E402
from fdfo.distributed.job import Job  # noqa: E402
from fdfo.distributed.launch import run_command_line, start_job  # noqa: E402
from fdfo.distributed.machine import StageClock, versions  # noqa: E402
from fdfo.method.rollout import Differences, Rollout  # noqa: E402
from fdfo.method.trainer import train  # noqa: E402
from fdfo.model.adapted_pipeline import COMPUTE_TYPES  # noqa: E402
from fdfo.model.families.base import Family  # noqa: E402
from fdfo.model.families.registry import find_family  # noqa: E402
from fdfo.model.flow_model import FlowModel  # noqa: E402
from fdfo.model.memory import trajectory_storage  # noqa: E402
from fdfo.model.text import TextEmbeddings  # noqa: E402
from rewards.scorer import WeightedReward  # noqa: E402


@dataclass(frozen=True)
class FullSizeConfig:
    """Time one rank's share of an epoch."""

    preset: Literal["sd35-medium", "sd35-medium-fast", "sd35-medium-24gb", "sd35-large", "flux2-klein", "z-image"] = "sd35-medium"
    """train.py's preset"""
    steps_per_trajectory: int | None = None
    """solver steps of a trajectory to train on (the preset's)"""
    branches: Literal["both", "one"] | None = None
    """branches of a pair to train on (the preset's)"""
    pairs: int = 54
    """pairs of the share, that is of each process"""
    solver_steps: int | None = None
    """solver steps of a trajectory (the preset's); ballast stands for those that are missing"""
    resolution: int = 512
    """width and height of the images"""
    roomy: bool = False
    """without the preset's flags for a small GPU: nothing is recomputed, nothing waits in host memory but the text encoders"""
    compile: bool = True
    """compile the blocks, as all presets do"""
    gpu_gb: float | None = None
    """10^9 bytes that PyTorch may take on the GPU, as if it had no more; all it has if left out"""
    eager: bool = False
    """the published way instead of the fast one"""
    max_batch_size: int | None = None
    """largest micro-batch (13; 9 for --eager, as that loop has it on 8 GPUs; what the preset says where it says it)"""
    reward_preset: str = "combined"
    """scorers of the share"""
    eval_prompts: int = 0
    """held-out prompts of an evaluation before the epoch and one after it; a rank of 8 has 16"""
    shard_vlm: bool = False
    """spread the judge over the processes even where one GPU has room for it"""
    shard_transformer: bool = False
    """spread the transformer over the processes even where one GPU has room for it"""
    one_gpu: bool = False
    """put all processes on the first GPU; they talk over gloo, since NCCL wants a GPU each"""
    gradient: Path | None = None
    """file for the gradient of the first optimizer step, and for the text, latents and rewards that it came from"""
    out: Path | None = None
    """JSON file for the figures"""


def on_meta(name: str) -> Family:
    """Return the model without weights: its family, around a transformer of the true size on the meta device."""
    network = getattr(diffusers, DiffusionPipeline.load_config(name)["transformer"][1])
    config = network.load_config(name, subfolder="transformer")
    with torch.device("meta"):
        transformer = network.from_config(config).requires_grad_(False)
    return find_family(name)(SimpleNamespace(transformer=transformer, vae_scale_factor=8, patch_size=2))


def mean_text(text: TextEmbeddings) -> TextEmbeddings:
    """Return one row, on the meta device, as long as these prompts are in the mean."""
    if text.lengths is None:
        return text.rows([0]).to(torch.device("meta"))
    length = round(text.lengths.double().mean().item())
    return TextEmbeddings(torch.empty(1, length, text.tokens.shape[2], device="meta"), None, torch.tensor([length]))


def count_tflop(name: str, text: TextEmbeddings, resolution: int) -> tuple[float, float]:
    """Return the TFLOP of one sample's forward pass, and of forward and backward with the LoRA, counted by PyTorch on the meta device.

    text: of some prompts of the share.
    """
    family, text = on_meta(name), mean_text(text)
    transformer = family.pipe.transformer
    with torch.device("meta"):
        get_peft_model(transformer, LoraConfig(r=32, lora_alpha=64, target_modules=family.lora_targets(transformer)))
        tokens, pooled = (None if part is None else part.float() for part in (text.tokens, text.pooled))
        x, text = torch.randn(1, *family.latent_shape(resolution)), TextEmbeddings(tokens, pooled, text.lengths)
        with FlopCounterMode(display=False) as forward:
            v = family.velocity(x, torch.ones(1), text)
        with FlopCounterMode(display=False) as backward:
            v.sum().backward()
    return forward.get_total_flops() / 1e12, (forward.get_total_flops() + backward.get_total_flops()) / 1e12


def ceiling(dtype: torch.dtype, seconds: float = 0.0) -> float:
    """Measure TFLOP/s of a matrix product of 8192^3: median of 20 on a cool GPU, or of the last 20 after some seconds.

    A GPU at its power limit lowers its clock, so that what it can do for a moment is not what it can do for an epoch.
    """
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=dtype)
    times, begin = [], time.perf_counter()
    while len(times) < 25 or time.perf_counter() - begin < seconds:
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * 8192**3 / sorted(times[-20:])[10] / 1e9


def run_config(config: FullSizeConfig, folder: Path, world_size: int) -> TrainConfig:
    """Return the options that train.py would get."""
    preset = PRESETS[config.preset]
    if config.roomy:
        preset = dataclasses.replace(
            preset, gradient_checkpointing=False, offload_scorers=False, offload_trajectories=False, max_batch_size=None
        )
    subset = {name: value for name in ("steps_per_trajectory", "branches") if (value := getattr(config, name)) is not None}
    if config.eager:
        subset["batch_size"] = config.max_batch_size or 9  # odd, which the plan of its own does not take
    return dataclasses.replace(
        preset, prompt_set="tiny_heldout", total_pairs_per_epoch=config.pairs * world_size, num_epochs=1, runs_dir=folder, compile=config.compile and not config.eager,
        max_batch_size=config.max_batch_size or preset.max_batch_size or (9 if config.eager else 13), reward_preset=config.reward_preset,
        sample=dataclasses.replace(preset.sample, num_solver_steps=config.solver_steps or preset.sample.num_solver_steps, resolution=config.resolution),
        train=dataclasses.replace(preset.train, **subset),
        eval_prompts=config.eval_prompts, eval_prompt_set="tiny",
    )  # fmt: skip


def ballast(run: TrainConfig, pairs: int, device: torch.device) -> list[torch.Tensor]:
    """Take memory for what fewer solver steps leave out of the kept samples, in float16: of the epoch, and of one batch on the GPU twice."""
    sample = dataclasses.replace(run.sample, num_solver_steps=PRESETS[run.preset].sample.num_solver_steps)
    missing = plan_subset(dataclasses.replace(run, sample=sample)).pair_samples - plan_subset(run).pair_samples
    latent = math.prod(on_meta(run.pretrained_model).latent_shape(run.sample.resolution))
    epoch = torch.ones(2 * pairs * missing * latent, dtype=torch.float16, device=trajectory_storage(run, device))
    return [epoch, torch.ones(2 * 2 * plan_batches(run, 1).sample_batch * missing * latent, dtype=torch.float16, device=device)]


@contextlib.contextmanager
def peaks_by_stage() -> Iterator[dict[str, dict[str, float]]]:
    """Record the largest memory on the GPU in every stage, 10^9 bytes; `start` is what comes before the first one."""
    peaks, stage = {}, StageClock.stage

    def note(name: str) -> None:
        found = {"allocated": torch.cuda.max_memory_allocated() / 1e9, "reserved": torch.cuda.max_memory_reserved() / 1e9}
        peaks[name] = {kind: max(value, peaks.get(name, found)[kind]) for kind, value in found.items()}
        torch.cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def watched(clock: StageClock, name: str) -> Iterator[None]:
        note("between stages" if peaks else "start")
        with stage(clock, name):
            yield
        note(name)

    StageClock.stage = watched
    try:
        yield peaks
    finally:
        StageClock.stage = stage


def main(config: FullSizeConfig) -> None:
    if config.eager:
        FlowModel.accelerate = lambda self, compiled_rows, resolution: None
        fdfo.model.flow_model.fast_attention = lambda device: contextlib.nullcontext()
        rewards.vlm.judge.use_varlen_attention = lambda visual, device: None
    if config.one_gpu:
        share_first_gpu()
    with start_job() as job, tempfile.TemporaryDirectory() as folder:
        dtype = COMPUTE_TYPES[PRESETS[config.preset].precision]
        top = {"moment": ceiling(dtype), "sustained": ceiling(dtype, seconds=4.0)}
        if config.gpu_gb is not None:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(config.gpu_gb * 1e9 / torch.cuda.get_device_properties(0).total_memory)
        settings = run_config(config, Path(folder), job.world_size)
        held = ballast(settings, config.pairs, job.device)
        if config.shard_vlm:
            rewards.vlm.judge.needs_sharding = lambda name, dtype, job: True
        if config.shard_transformer:
            fdfo.method.prepare.needs_sharding = lambda job, modules: True
        if config.gradient is not None:
            keep_first_step(config.gradient)
        with peaks_by_stage() as peaks:
            run = train(job, settings)
        del held
        if job.is_main:
            lines = [json.loads(line) for line in run.log.path.read_text().splitlines()]
            text = run.model.encode_prompts(run.prompts[:16], 1.0)[0]
            work = count_tflop(settings.pretrained_model, text, settings.sample.resolution)
            report(config, settings, job.world_size, {"ceiling": top, "peaks": peaks, "tflop": work}, lines)


def share_first_gpu() -> None:
    """Let start_job put every process on the first GPU."""
    os.environ["LOCAL_RANK"] = "0"
    initialise = dist.init_process_group
    dist.init_process_group = lambda backend, **settings: initialise("gloo", **settings)


def keep_first_step(path: Path) -> None:
    """Write a file on rank 0: the first gradient that the update sums over the processes, and what it came from on this rank.

    That is, of this rank's pairs: text, final latents, scores and reward differences.
    """
    reduce, score, kept = fdfo.method.update.reduce_gradient, fdfo.method.trainer.score_share, {}

    def score_and_keep(rollout: Rollout, images: torch.Tensor, reward: WeightedReward) -> Differences:
        found = score(rollout, images, reward)
        source = {"text": rollout.share.text.tokens, "latents": rollout.final, **found.scores, "dR": found.dR}
        kept.update({name: tensor.float().cpu() for name, tensor in source.items()})
        return found

    def reduce_and_keep(job: Job, parameters: list[torch.nn.Parameter], scale: float) -> None:
        reduce(job, parameters, scale)
        if job.is_main and not path.exists():
            torch.save(kept | {"gradient": torch.cat([p.grad.flatten() for p in parameters]).cpu()}, path)

    path.unlink(missing_ok=True)
    fdfo.method.update.reduce_gradient, fdfo.method.trainer.score_share = reduce_and_keep, score_and_keep


def report(config: FullSizeConfig, settings: TrainConfig, processes: int, measured: dict, lines: list[dict]) -> None:
    """Write the figures of rank 0 as JSON, to the console and to --out. measured: ceiling, peaks and work; lines: the run's log."""
    top, peaks = measured["ceiling"], measured["peaks"]
    start, epoch = (next(line for line in lines if line["kind"] == kind) for kind in ("start", "epoch"))
    steps = [line for line in lines if line["kind"] == "step"]
    seconds = {name: value for name, value in epoch["seconds"].items() if name != "checkpoint"}
    (forward, both), steps_done = measured["tflop"], settings.sample.num_solver_steps
    all_steps = PRESETS[config.preset].sample.num_solver_steps
    plan = plan_batches(settings, processes)
    trained, drawn = plan.samples // processes, settings.train.steps_per_trajectory is not None
    scaled = ("sample",) if drawn else ("sample", "update")  # with the solver steps
    whole = {name: value * (all_steps / steps_done if name in scaled else 1) for name, value in seconds.items()}
    rates = {
        name: {"samples_per_second": samples / seconds[name], "tflop_per_second": samples * work / seconds[name]}
        for name, samples, work in (
            ("sample", 2 * config.pairs * steps_done, forward),
            ("update", trained, both),
        )
    }
    result = {
        "device": torch.cuda.get_device_name(), "config": to_dict(config), "processes": processes, "versions": versions(),
        "batch_sizes": {"pairs in sampling": plan.sample_batch, "samples in training": plan.train_batch},
        "trained_samples": trained,
        "seconds": seconds, "share_seconds": sum(whole.values()), "seconds_with_all_steps": whole,
        "epoch_gpu_seconds": 432 / config.pairs * sum(whole.values()),
        "tflop_per_sample": {"forward": forward, "forward and backward": both}, "ceiling_tflop_per_second": top, "rates": rates,
        "share_of_ceiling": {
            name: {kind: rate["tflop_per_second"] / value for kind, value in top.items()} for name, rate in rates.items()
        },
        "compile_seconds": start["compile_seconds"], "ratio_at_unchanged_weights": steps[0]["ratio_first"],
        "evaluation_seconds": [line["seconds"] for line in lines if line["kind"] == "eval"],
        "loss_scale": [step["loss_scale"] for step in steps], "grad_norm": [step["grad_norm"] for step in steps],
        "peak_gb": {kind: max(peak[kind] for peak in peaks.values()) for kind in ("allocated", "reserved")},
        "peak_gb_by_stage": peaks,
        "peak_host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    if config.out is not None:
        config.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_command_line(lambda: main(tyro.cli(FullSizeConfig)))
