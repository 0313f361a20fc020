"""The tables and the plot of learning.py: scores of held-out prompts by epoch and by cost."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import numpy as np
from pages import shown, table

from fdfo.config.plan import plan_batches
from fdfo.config.train_options import TrainConfig
from fdfo.evaluation.best_checkpoint import change, quality
from fdfo.evaluation.statistics import Change, evaluation_of

TRAINED_SAMPLE = 2.2  # cost of a sample of the update at full size, in forwards of sampling
MILESTONES = (10, 20, 50, 100, 150, 200, 300)  # epochs of the tables, beside the last


@dataclass(frozen=True)
class Cost:
    """What an epoch takes."""

    rewards: int  # images that are scored
    forwards: int  # of the network, in sampling and for v_ref at latents noised anew
    trained: int  # samples of the update, each a forward and a backward

    @property
    def total(self) -> float:
        """Return the cost in forwards."""
        return self.forwards + TRAINED_SAMPLE * self.trained


def cost_of_epoch(config: TrainConfig) -> Cost:
    """Return what an epoch of these settings takes."""
    images, each = 2 * config.total_pairs_per_epoch, 1 if config.sample.guidance_scale == 1 else 2
    samples = plan_batches(config, 1).samples
    forwards = images * config.sample.num_solver_steps + (samples if config.train.forward_process else 0)
    return Cost(images, each * forwards, each * samples)


@dataclass(frozen=True)
class LearningRun:
    """A run of train.py, as its log tells it."""

    setting: str
    seed: int
    config: TrainConfig
    end: dict[str, float]  # seconds of the whole command, `wall`; and perhaps the score on another grid, `grid`
    log: list[dict]

    @property
    def cost(self) -> Cost:
        """What an epoch takes. The logs of benchmarks/rivals/ say it themselves."""
        said = next((line["cost"] for line in self.of("epoch") if "cost" in line), None)
        return cost_of_epoch(self.config) if said is None else Cost(**said)

    def of(self, kind: str) -> list[dict]:
        return [line for line in self.log if line["kind"] == kind]

    def curve(self) -> dict[int, float]:
        """Return the mean held-out scene score by epoch."""
        evaluations = [evaluation_of(line) for line in self.of("eval")]
        return {one.epoch: fmean(value for value in one.scores["scene"] if math.isfinite(value)) for one in evaluations}

    def means(self, name: str) -> dict[int, float]:
        """Return a held-out mean by epoch, as the log has it."""
        return {line["epoch"]: line["means"][name] for line in self.of("eval")}

    def rise(self, epoch: int) -> float:
        """Return what checkpoints/best goes by: the mean rise of the metrics not trained on, in spreads; NaN if there was no evaluation."""
        start, *_ = lines = self.of("eval")
        found = [quality(evaluation_of(start), evaluation_of(line), line["held_out"]) for line in lines if line["epoch"] == epoch]
        return found[0] if found else math.nan

    def seconds(self) -> list[float]:
        """Return the seconds of each epoch."""
        return [sum(line["seconds"].values()) for line in self.of("epoch")]


def by_setting(runs: list[LearningRun]) -> dict[str, list[LearningRun]]:
    return {name: [run for run in runs if run.setting == name] for name in dict.fromkeys(run.setting for run in runs)}


def mean_curve(runs: list[LearningRun]) -> tuple[list[int], np.ndarray]:
    """Return the epochs that all runs of a setting were evaluated at, and their scores there: [runs, epochs]."""
    curves = [run.curve() for run in runs]
    epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
    return epochs, np.array([[curve[epoch] for epoch in epochs] for curve in curves])


def at_cost(run: LearningRun, cost: float) -> float:
    """Return the score at a cost, on a straight line between two evaluations; NaN beyond the run's end."""
    curve = run.curve()
    return float(np.interp(cost / run.cost.total, list(curve), list(curve.values()), right=math.nan))


def cost_of(run: LearningRun, target: float) -> float:
    """Return the cost at which a run's score first reaches the target, on a straight line between two evaluations; or NaN."""
    points = list(run.curve().items())
    if points[0][1] >= target:
        return 0.0
    for (epoch, score), (later, higher) in zip(points[:-1], points[1:], strict=True):
        if higher >= target:
            return run.cost.total * (epoch + (later - epoch) * (target - score) / (higher - score))
    return math.nan


def plot(path: Path, runs: list[LearningRun], target: float) -> None:
    """Draw the score against the cost: the mean of the seeds and their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for name, group in by_setting(runs).items():
        epochs, scores = mean_curve(group)
        x = np.array(epochs) * group[0].cost.total / 1e6
        (line,) = axes.plot(x, scores.mean(0), marker=".", label=f"{name} ({len(group)} seeds)")
        axes.fill_between(x, scores.min(0), scores.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axhline(target, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"cost: forwards of the network, millions; a sample of the update counts {TRAINED_SAMPLE}")
    axes.set_ylabel("held-out scene score")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def tables(runs: list[LearningRun], levels: dict[str, dict[str, float]], target: float) -> str:
    """Return all tables as Markdown. levels: scores of the base and of true renderings."""
    groups = by_setting(runs)
    lines = table(
        ["held-out pictures", "scene", "scene_clip"],
        [[name, f"{row['scene']:.1f}", f"{row['scene_clip']:.2f}"] for name, row in levels.items()],
    )
    return "\n".join(
        lines + seed_table(runs, levels) + cost_table(groups) + score_tables(groups, target) + training_rewards(runs)
    )


def described(rise: Change) -> str:
    return f"{rise.before:.2f} -> {rise.after:.2f} ({rise.difference:+.2f} +- {rise.error:.2f})"


def seed_table(runs: list[LearningRun], levels: dict[str, dict[str, float]]) -> list[str]:
    """Show where each run ended."""
    gap, rows = levels["true renderings"]["scene"] - levels["base, guidance 1"]["scene"], []
    for run in runs:
        evaluations = [evaluation_of(line) for line in run.of("eval")]
        scene, clip = (change(name, evaluations[0], evaluations[-1]) for name in ("scene", "scene_clip"))
        share = f"{scene.difference / gap:.0%}"
        times = f"{sum(run.seconds()):.0f}", f"{run.end['wall']:.0f} s", f"{run.end['grid']:.2f}" if "grid" in run.end else "-"
        rows.append([run.setting, run.seed, evaluations[-1].epoch, described(scene), share, described(clip), *times])
    head = ["setting", "seed", "epochs", "scene before -> after", "gap closed", "scene_clip before -> after"]
    return table([*head, "training seconds", "whole command", "scene with --grid"], rows)


def cost_table(groups: dict[str, list[LearningRun]]) -> list[str]:
    """Show what an epoch of each setting takes."""
    first, rows = next(iter(groups.values()))[0].cost.total, []
    for name, group in groups.items():
        cost = group[0].cost
        seconds = [second for run in group for second in run.seconds()]
        counts = [f"{count:,}" for count in (cost.rewards, cost.forwards + cost.trained, cost.trained, round(cost.total))]
        rows.append([name, *counts, f"{cost.total / first:.0%}", f"{median(seconds):.2f}" if seconds else "-"])
    head = ["an epoch of", "reward evaluations", "network evaluations", "of them trained samples", "cost, forwards"]
    return table([*head, "of the first's", "seconds, median"], rows)


def milestones(runs: list[LearningRun]) -> list[int]:
    """Return the epochs to show, of those that all the runs were evaluated at."""
    common = set.intersection(*(set(run.curve()) for run in runs))
    return sorted(common & {*MILESTONES, max(common)} - {0})


def score_tables(groups: dict[str, list[LearningRun]], target: float) -> list[str]:
    """Show held-out scene scores by epoch, by cost, and the cost of the target: mean of the seeds, and each."""
    first = next(iter(groups.values()))
    epochs, reached = milestones([run for group in groups.values() for run in group]), milestones(first)
    by_epoch, by_cost = [], []
    for name, group in groups.items():
        by_epoch.append([name, *[shown([run.curve()[epoch] for run in group], ".1f") for epoch in epochs]])
        by_cost.append([name, *[shown([at_cost(run, epoch * first[0].cost.total) for run in group], ".1f") for epoch in reached]])
    needed = {name: [cost_of(run, target) / 1e6 for run in group] for name, group in groups.items()}
    base = fmean(next(iter(needed.values())))
    rows = [[name, shown(values, ".2f"), share(fmean(values), base)] for name, values in needed.items()]
    return (
        table(["scene after epochs", *epochs], by_epoch)
        + table(["scene at the cost of epochs of the first", *reached], by_cost)
        + table([f"cost of scene {target:g}", "million forwards", "of the first's"], rows)
    )


def share(value: float, of: float) -> str:
    return f"{value / of:.0%}" if of and not math.isnan(value / of) else "-"


def training_rewards(runs: list[LearningRun]) -> list[str]:
    lines = []
    for run in runs:
        rewards = [line["reward_mean"] for line in run.of("epoch")]
        width = max(1, len(rewards) // 30)
        means = [fmean(rewards[i : i + width]) for i in range(0, len(rewards), width)]
        lines.append(f"- {run.setting}, seed {run.seed}, every {width}: " + " ".join(f"{value:.1f}" for value in means))
    return ["Training reward, mean of some epochs each:", "", *lines, ""]
