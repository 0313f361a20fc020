"""One rank's share of an 8-GPU epoch at full size with random weights, through train.py's own stages: fast, or the published way.

python benchmarks/random_hub.py --out /dev/shm/random_hub
export HF_HOME=/dev/shm/random_hub HF_HUB_OFFLINE=1
python benchmarks/full_size.py --out fast.json
python benchmarks/full_size.py --eager --out eager.json

The whole epoch (432 pairs) is 8 times the default 54 pairs. --eager runs the same stages without compiling, with frozen
weights in bfloat16 under autocast, diffusers' attention with PEFT's layers, the library's vision attention, and
EAGER_BATCHES. Both include what is done once an epoch: encoding the prompts, with the text encoders brought from the host.

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
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from full_size_figures import ceiling, count_tflop, figures, on_meta, peaks_by_stage  # noqa: E402

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
from fdfo.distributed.machine import versions  # noqa: E402
from fdfo.method.rollout import Differences, Rollout  # noqa: E402
from fdfo.method.trainer import train  # noqa: E402
from fdfo.model.adapted_pipeline import COMPUTE_TYPES  # noqa: E402
from fdfo.model.flow_model import FlowModel  # noqa: E402
from fdfo.model.memory import trajectory_storage  # noqa: E402
from rewards.scorer import WeightedReward  # noqa: E402

# Pairs of a micro-batch in sampling, and samples of one in training: the published loop takes at most 13 on 8 GPUs, and these divide
# what a GPU has there, 54 pairs and 1,080 samples of an optimizer step.
EAGER_BATCHES = (9, 12)


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
    """largest micro-batch (13; what the preset says where it says it); for --eager that size everywhere, instead of EAGER_BATCHES"""
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


def run_config(config: FullSizeConfig, folder: Path, world_size: int) -> TrainConfig:
    """Return the options that train.py would get."""
    preset = PRESETS[config.preset]
    if config.roomy:
        preset = dataclasses.replace(
            preset, gradient_checkpointing=False, offload_scorers=False, offload_trajectories=False, max_batch_size=None
        )
    update = {name: value for name in ("steps_per_trajectory", "branches") if (value := getattr(config, name)) is not None}
    sampled, trained = (config.max_batch_size,) * 2 if config.max_batch_size else EAGER_BATCHES
    if config.eager:
        update["batch_size"] = trained
    return dataclasses.replace(
        preset, prompt_set="tiny_heldout", total_pairs_per_epoch=config.pairs * world_size, num_epochs=1, runs_dir=folder, compile=config.compile and not config.eager,
        max_batch_size=config.max_batch_size or preset.max_batch_size or 13, reward_preset=config.reward_preset,
        sample=dataclasses.replace(preset.sample, num_solver_steps=config.solver_steps or preset.sample.num_solver_steps, resolution=config.resolution, batch_size=sampled if config.eager else None),
        train=dataclasses.replace(preset.train, **update),
        eval_prompts=config.eval_prompts, eval_prompt_set="tiny",
    )  # fmt: skip


def ballast(run: TrainConfig, pairs: int, device: torch.device) -> list[torch.Tensor]:
    """Take memory for what fewer solver steps leave out of the kept samples, in float16: of the epoch, and of one batch on the GPU twice."""
    sample = dataclasses.replace(run.sample, num_solver_steps=PRESETS[run.preset].sample.num_solver_steps)
    missing = plan_subset(dataclasses.replace(run, sample=sample)).pair_samples - plan_subset(run).pair_samples
    latent = math.prod(on_meta(run.pretrained_model).latent_shape(run.sample.resolution))
    epoch = torch.ones(2 * pairs * missing * latent, dtype=torch.float16, device=trajectory_storage(run, device))
    return [epoch, torch.ones(2 * 2 * plan_batches(run, 1).sample_batch * missing * latent, dtype=torch.float16, device=device)]


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
            found = figures(settings, job.world_size, {"ceiling": top, "peaks": peaks, "tflop": work}, lines)
            result = {
                "device": torch.cuda.get_device_name(),
                "config": to_dict(config) | {"out": None, "gradient": None},
                "versions": versions(),
            } | found
            print(json.dumps(result, indent=2))
            if config.out is not None:
                config.out.write_text(json.dumps(result, indent=2) + "\n")


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


if __name__ == "__main__":
    run_command_line(lambda: main(tyro.cli(FullSizeConfig)))
