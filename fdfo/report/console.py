"""Formats what a training run prints: after each epoch and evaluation, and when it ends."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from fdfo.config.train_options import TrainConfig
from fdfo.distributed.job import Job


def print_epoch(job: Job, epochs: str, numbers: Mapping[str, float], seconds: float, warnings: list[str]) -> None:
    """Print one line of an epoch, and its warnings. epochs: such as 3/20; numbers: of its log line."""
    reward = f"reward {numbers['reward_mean']:.3f} +- {numbers['reward_std']:.3f}, " if "reward_mean" in numbers else ""
    job.print(
        f"{time.strftime('%H:%M:%S')} epoch {epochs}: {reward}pairs that differ {numbers['differing_pairs']:.0%}, clipfrac "
        f"{numbers['clipfrac']:.2f}, grad norm {numbers['grad_norm']:.3g}, {seconds:.1f} s"
    )
    for warning in warnings:
        job.print(f"warning: epoch {epochs.partition('/')[0]}: {warning}")


def print_evaluation(line: Mapping[str, object]) -> None:
    """Print one line of an evaluation, and its warnings, from its log line: reward and held-out metrics, and their change."""
    epoch, cells = line["epoch"], []
    shown = [name for name in ("reward", *line["held_out"]) if name in line["changes"]]  # with judges of pairs alone no reward
    for name in shown:
        change = line["changes"][name]
        moved = f" ({number(change['difference'], '+.3g')} +- {number(change['error'], '.2g')})" if epoch > 0 else ""
        cells.append(f"{name} {number(change['after'], '.4g')}{moved}")
    best = "none yet" if line["best"] is None else f"epoch {line['best']}"
    chosen = f"; best checkpoint: {best}" if epoch > 0 and line["held_out"] else ""  # without metrics none can be the best
    print(
        f"{time.strftime('%H:%M:%S')} evaluation after epoch {epoch}: {', '.join(cells) or 'images alone'}{chosen}, {line['seconds']:.1f} s",
        flush=True,
    )
    for warning in line["warnings"]:
        print(f"warning: evaluation after epoch {epoch}: {warning}", flush=True)


def print_end(run: Path, report: Path | None, newest: Mapping[str, object] | None) -> None:
    """Print where everything is, and what the run has changed on held-out prompts. newest: line of the last evaluation."""
    print(f"run: {run}\nlog: {run / 'training_log.jsonl'}")
    if report is not None:
        print(f"report: {report}")
    if newest is None:
        return
    print(f"samples: {run / 'samples'}")
    if newest["best"] is not None:
        print(f"best checkpoint: {run / 'checkpoints' / 'best'} (epoch {newest['best']})")
    for name, change in newest["changes"].items():
        if name != "reward":
            before, after, moved = (
                number(change[key], "+.3g" if key == "difference" else ".4g") for key in ("before", "after", "difference")
            )
            print(
                f"held-out {name} score {before} -> {after} ({moved} +- {number(change['error'], '.2g')}, {change['count']} prompts)"
            )


def number(value: float | None, form: str) -> str:
    """Format a number of the log, where null stands for NaN."""
    return "nan" if value is None else format(value, form)


def resume_command(job: Job, config: TrainConfig, run: Path) -> str:
    """Return the command line that resumes a run."""
    flags = {"--reward-specs": config.reward_specs, "--eval-metrics": config.eval_metrics}
    own = {
        flag: names for flag, names in flags.items() if any(":" in name for name in names)
    }  # the user must name own code again
    again = "".join(f" {flag} {' '.join(names)}" for flag, names in own.items())
    return f"{' '.join(launcher(job))} {sys.argv[0]} --resume-from {run}{again}"


def launcher(job: Job) -> list[str]:
    """Return the words before the script's name on the command line."""
    return ["python"] if job.world_size == 1 else ["torchrun", f"--nproc_per_node={job.world_size}"]
