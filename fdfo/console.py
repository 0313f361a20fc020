"""What a training run says: at its start, within a stage, after each epoch and evaluation, and when it ends."""

import math
import sys
import time

import torch

from fdfo.checkpoint import BEST
from fdfo.config import TrainConfig, UserError
from fdfo.distributed import Job
from fdfo.health import Signs, relative_change
from fdfo.memory import expected_memory
from fdfo.meters import memory_gib, peak_memory_gib
from fdfo.preparation import Run
from fdfo.report import write_report
from fdfo.rollout import Differences, gather_scores
from fdfo.selection import REWARD, change, evaluation_of
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
    if run.held_out is None:
        job.print("evaluation: none, no prompts are held out (--eval-prompt-set or --eval-prompts gives some)")
    else:
        metrics = ", ".join(("the reward", *run.held_out.metrics))
        job.print(
            f"evaluation: {len(run.held_out.prompts)} held-out prompts, {run.held_out.repeats} picture(s) each, every "
            f"{config.eval_every} epochs: {metrics}"
        )
    job.print(run.plan.describe())
    job.print(expected_memory(job, config, run.model, run.plan))
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


def report_evaluation(job: Job, run: Run, warnings: list[str], seconds: float) -> None:
    """One console line of the newest evaluation: reward and held-out metrics, and their change since epoch 0."""
    if not job.is_main:
        return
    first, newest = (evaluation_of(run.log.evaluations[i]) for i in (0, -1))
    best = run.log.evaluations[-1]["best"]
    cells = []
    for name in (REWARD, *run.held_out.metrics):
        rise = change(name, first, newest)
        cells.append(f"{name} {rise.after:.4g}" + (f" ({rise.difference:+.3g} +- {rise.error:.2g})" if newest.epoch > 0 else ""))
    told = newest.epoch > 0 and run.held_out.metrics  # without such metrics no checkpoint can be the best
    chosen = f"; best checkpoint: {'none yet' if best is None else f'epoch {best}'}" if told else ""
    job.print(f"{time.strftime('%H:%M:%S')} evaluation after epoch {newest.epoch}: {', '.join(cells)}{chosen}, {seconds:.1f} s")
    for warning in warnings:
        job.print(f"warning: evaluation after epoch {newest.epoch}: {warning}")


def report_end(job: Job, run: Run) -> None:
    """Where everything is, and what the run has changed on held-out prompts."""
    job.print(
        f"run: {run.folder}\nlog: {run.folder / 'training_log.jsonl'}\nreport: {job.on_main(lambda: write_report(run.folder))}"
    )
    if not job.is_main or run.held_out is None:
        return
    first, last = (evaluation_of(run.log.evaluations[i]) for i in (0, -1))
    job.print(f"samples: {run.folder / 'samples'}")
    if run.log.evaluations[-1]["best"] is not None:
        job.print(f"best checkpoint: {run.folder / 'checkpoints' / BEST} (epoch {run.log.evaluations[-1]['best']})")
    for name in (*run.held_out.weights, *run.held_out.metrics):
        rise = change(name, first, last)
        job.print(
            f"held-out {name} score {rise.before:.4g} -> {rise.after:.4g} ({rise.difference:+.3g} +- {rise.error:.2g}, "
            f"{rise.count} prompts)"
        )


def strict_stop(run: Run, warnings: list[str]) -> UserError:
    """What --strict ends with."""
    return UserError(
        f"--strict stops after epoch {run.progress.epochs}, with a checkpoint: {'; '.join(warnings)}. Mend that, or go on from "
        f"{run.folder} with --no-strict."
    )


def resume_command(job: Job, config: TrainConfig, run: Run) -> str:
    """The command line that goes on where a run was stopped."""
    flags = {"--reward-specs": config.reward_specs, "--eval-metrics": config.eval_metrics}
    own = {flag: names for flag, names in flags.items() if any(":" in name for name in names)}  # is run on the user's word alone
    again = "".join(f" {flag} {' '.join(names)}" for flag, names in own.items())
    return f"{' '.join(launcher(job))} {sys.argv[0]} --resume-from {run.folder}{again}"


def launcher(job: Job) -> list[str]:
    return ["python"] if job.world_size == 1 else ["torchrun", f"--nproc_per_node={job.world_size}"]


def command(job: Job) -> list[str]:
    """The words that started this process, for the log."""
    return [*launcher(job), *sys.argv]


def finite_mean(values: list[float]) -> float:
    return mean([value for value in values if math.isfinite(value)])


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
