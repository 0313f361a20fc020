"""What a training run says: at its start, after each epoch, and when it stops."""

import math
import sys
import time

import torch

from fdfo.config import TrainConfig, UserError
from fdfo.distributed import Job
from fdfo.health import Signs, relative_change
from fdfo.logger import memory_gib, peak_memory_gib
from fdfo.preparation import Run
from fdfo.rollout import Differences, gather_scores
from fdfo.training_state import adapter_copy
from fdfo.update import StepStats


def announce(job: Job, config: TrainConfig, run: Run) -> None:
    parameters = run.model.trainable()
    count = sum(p.numel() for p in parameters)
    rewards = " + ".join(f"{weight:g} {name}" for name, weight in run.reward.weights.items())
    job.print(
        f"model: {config.pretrained_model} ({config.precision}) on {job.device.type}, LoRA of {len(parameters) // 2} modules, {count:,} parameters"
    )
    job.print(f"reward: {rewards}; {len(run.prompts)} prompts; churn {config.churn.schedule}")
    job.print(run.plan.describe())
    job.print(f"run folder: {run.folder}")


def report_epoch(
    job: Job,
    config: TrainConfig,
    run: Run,
    seconds: dict[str, float],
    differences: Differences,
    one_colour: torch.Tensor,
    steps: list[StepStats],
) -> list[str]:
    """One log object and one console line of an epoch, from the scores of the whole job; the warnings of its health."""
    extra = {"reward": differences.reward, "dropped": differences.dropped.float(), "one colour": one_colour}
    scores = gather_scores(job, differences.scores | extra)
    dropped = torch.tensor(scores.pop("dropped")).bool()
    plain = mean(scores.pop("one colour"))
    reward = torch.tensor(scores.pop("reward"), dtype=torch.float64)
    pairs = reward.view(-1, 2)[~dropped[::2]]  # [P, 2]
    values = {
        "reward_mean": float(pairs.mean()),
        "reward_std": float(pairs.std()),
        "scores": {name: finite_mean(values) for name, values in scores.items()},
        "differing_pairs": float((pairs[:, 0] != pairs[:, 1]).double().mean()),
        "reward_difference": float((pairs[:, 0] - pairs[:, 1]).abs().mean()),
        "dropped_pairs": int(dropped.sum()) // 2,
        "skipped_steps": sum(not step.applied for step in steps),
        "clipfrac": mean([step.clipfrac for step in steps]),
        "loss": mean([step.loss for step in steps]),
        "grad_norm": mean([step.grad_norm for step in steps]),
        "ratio_first": steps[0].ratio_first,
        "adapter_change": relative_change(run.progress.epoch_start, adapter_copy(run.model)),
    }
    dropped_share = values["dropped_pairs"] / config.total_pairs_per_epoch
    signs = Signs(values["differing_pairs"], dropped_share, plain, values["adapter_change"], steps)
    warnings = job.on_main(lambda: run.health.check(signs))  # rank 0 alone has read the log of a resumed run
    memory = {"memory_gib": memory_gib(job.device), "peak_memory_gib": peak_memory_gib(job.device)}
    run.log.write("epoch", run.progress.epochs, **values, warnings=warnings, seconds=seconds, **memory)
    job.print(
        f"{time.strftime('%H:%M:%S')} epoch {run.progress.epochs}/{config.num_epochs}: reward {values['reward_mean']:.3f} +- "
        f"{values['reward_std']:.3f}, pairs that differ {values['differing_pairs']:.0%}, clipfrac {values['clipfrac']:.2f}, "
        f"grad norm {values['grad_norm']:.3g}, {sum(seconds.values()):.1f} s"
    )
    for warning in warnings:
        job.print(f"warning: epoch {run.progress.epochs}: {warning}")
    return warnings


def strict_stop(run: Run, warnings: list[str]) -> UserError:
    """What --strict ends with."""
    return UserError(
        f"--strict stops after epoch {run.progress.epochs}, with a checkpoint: {'; '.join(warnings)}. Mend that, or go on from "
        f"{run.folder} with --no-strict."
    )


def resume_command(job: Job, config: TrainConfig, run: Run) -> str:
    """The command line that goes on where a run was stopped."""
    launcher = "python" if job.world_size == 1 else f"torchrun --nproc_per_node={job.world_size}"
    own = [spec for spec in config.reward_specs if ":" in spec]  # code of one's own is run on the user's word alone
    specs = f" --reward-specs {' '.join(config.reward_specs)}" if own else ""
    return f"{launcher} {sys.argv[0]} --resume-from {run.folder}{specs}"


def finite_mean(values: list[float]) -> float:
    return mean([value for value in values if math.isfinite(value)])


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
