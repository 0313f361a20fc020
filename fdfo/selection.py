"""What a run's evaluations say together: the change since epoch 0, signs of reward hacking, and the best checkpoint."""

import math
import statistics
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass

from fdfo.results import standard_error

REWARD = "reward"  # name of the weighted sum that is trained on, among an evaluation's scores
EVALUATIONS_RUNNING = 2  # how often in a row a held-out score must fall before it counts as hacking


@dataclass(frozen=True)
class Evaluation:
    """Scores of the held-out prompts at one epoch: the same prompts and seeds at every epoch."""

    epoch: int
    scores: dict[str, list[float]]  # by name: one number a prompt, NaN where it has none


@dataclass(frozen=True)
class Change:
    """Two means over the prompts that have both scores, and the standard error of the paired difference."""

    before: float
    after: float
    error: float
    count: int

    @property
    def difference(self) -> float:
        return self.after - self.before


def evaluation_of(line: dict) -> Evaluation:
    """The evaluation in a line of the log, where null stands for NaN."""
    scores = {name: [math.nan if value is None else float(value) for value in values] for name, values in line["scores"].items()}
    return Evaluation(line["epoch"], scores)


def change(name: str, first: Evaluation, second: Evaluation) -> Change:
    pairs = [
        (a, b) for a, b in zip(first.scores[name], second.scores[name], strict=True) if math.isfinite(a) and math.isfinite(b)
    ]
    if not pairs:
        return Change(math.nan, math.nan, math.nan, 0)
    before, after = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return Change(before, after, standard_error([b - a for a, b in pairs]), len(pairs))


def hacking_signs(
    evaluations: Sequence[Evaluation], held_out: Collection[str], diversities: Collection[str], least_diversity: float
) -> list[str]:
    """One sentence for every sign, at the newest of these evaluations, that the reward is gained at another score's cost.

    held_out: names not trained on; diversities: those of them that measure diversity, which falls a little in healthy runs too and
    so has a limit of its own. Evaluations are in the order of epochs.
    """
    signs = []
    recent = evaluations[-EVALUATIONS_RUNNING - 1 :]
    steps = list(zip(recent[:-1], recent[1:], strict=True))
    if len(steps) == EVALUATIONS_RUNNING and all(change(REWARD, *step).difference > 0 for step in steps):
        for name in (name for name in held_out if name not in diversities):
            if all(change(name, *step).difference < -change(name, *step).error for step in steps):
                whole = change(name, recent[0], recent[-1])
                signs.append(
                    f"the reward rises while {name} falls, {whole.before:.4g} -> {whole.after:.4g} since epoch {recent[0].epoch}: "
                    "the adapter may be exploiting the reward, look at the samples and at checkpoints/best"
                )
    for name in diversities:
        since_start = change(name, evaluations[0], evaluations[-1])
        if since_start.after < least_diversity * since_start.before:
            signs.append(
                f"{name} is down to {since_start.after / since_start.before:.0%} of epoch {evaluations[0].epoch}: pictures of a "
                "prompt become alike, go back to an earlier checkpoint"
            )
    return signs


def quality(start: Evaluation, evaluation: Evaluation, held_out: Collection[str]) -> float:
    """Mean over the held-out metrics of the rise since the start, in units of the metric's spread over the prompts there.

    A metric without a spread at the start, or without a score in common with it, counts as unchanged.
    """
    rises = []
    for name in held_out:
        known = [value for value in start.scores[name] if math.isfinite(value)]
        spread, rise = statistics.stdev(known) if len(known) > 1 else 0.0, change(name, start, evaluation)
        rises.append(rise.difference / spread if spread > 0 and rise.count > 0 else 0.0)
    return sum(rises) / len(rises)


def best_epoch(evaluations: Sequence[Evaluation], held_out: Collection[str], saved: Container[int]) -> int | None:
    """The epoch of the best checkpoint by quality(), the earlier of equals; None where none is better than the start.

    saved: epochs whose checkpoint is there. A run that goes on from an earlier checkpoint, or with other evaluations, may have
    lost the one that would be the best of those that count now.
    """
    if not held_out or len(evaluations) < 2:
        return None
    best, epoch = 0.0, None
    for evaluation in (one for one in evaluations[1:] if one.epoch in saved):
        if (value := quality(evaluations[0], evaluation, held_out)) > best:
            best, epoch = value, evaluation.epoch
    return epoch
