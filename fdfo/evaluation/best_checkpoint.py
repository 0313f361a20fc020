"""Compares a run's evaluations: signs of reward hacking, and the best checkpoint."""

import math
import statistics
from collections.abc import Collection, Container, Sequence

from fdfo.evaluation.statistics import REWARD, Change, Evaluation, paired_change

FALLS_IN_A_ROW = 2  # evaluations in a row at which a held-out score must fall to count as hacking


def change(name: str, first: Evaluation, second: Evaluation) -> Change:
    """Compare one score of two evaluations, paired by prompt."""
    return paired_change(first.scores[name], second.scores[name])


def hacking_warnings(evaluations: Sequence[Evaluation], held_out: Collection[str]) -> list[str]:
    """Warn of every held-out score that falls while the reward rises, at the newest evaluations; diversities left out.

    held_out: names not trained on. Evaluations are in the order of epochs. Those of a run with judges of pairs alone have no reward.
    """
    recent = evaluations[-FALLS_IN_A_ROW - 1 :]
    steps = list(zip(recent[:-1], recent[1:], strict=True))
    if len(steps) < FALLS_IN_A_ROW or REWARD not in recent[-1].scores:
        return []
    if not all(change(REWARD, *step).difference > 0 for step in steps):
        return []
    found = []
    for name in held_out:
        if all(change(name, *step).difference < -change(name, *step).error for step in steps):
            whole = change(name, recent[0], recent[-1])
            found.append(
                f"the reward rises while {name} falls, {whole.before:.4g} -> {whole.after:.4g} since epoch {recent[0].epoch}: "
                "the adapter may be exploiting the reward, look at the samples and at checkpoints/best"
            )
    return found


def diversity_warnings(evaluations: Sequence[Evaluation], diversities: Collection[str], least: float) -> list[str]:
    """Warn of every diversity that is below the share `least` of its value at the first evaluation.

    A diversity falls a little in healthy runs too, so it has this limit instead of that of hacking_warnings.
    """
    found = []
    for name in diversities:
        since_start = change(name, evaluations[0], evaluations[-1])
        if since_start.after < least * since_start.before:
            found.append(
                f"{name} is down to {since_start.after / since_start.before:.0%} of epoch {evaluations[0].epoch}: images of a "
                "prompt become alike, go back to an earlier checkpoint"
            )
    return found


def quality(start: Evaluation, evaluation: Evaluation, held_out: Collection[str]) -> float:
    """Return the mean rise of the held-out metrics since the start, each divided by its spread over the prompts there.

    A metric without a spread at the start, or without a score in common with it, counts as unchanged.
    """
    rises = []
    for name in held_out:
        known = [value for value in start.scores[name] if math.isfinite(value)]
        spread, rise = statistics.stdev(known) if len(known) > 1 else 0.0, change(name, start, evaluation)
        rises.append(rise.difference / spread if spread > 0 and rise.count > 0 else 0.0)
    return sum(rises) / len(rises)


def best_epoch(evaluations: Sequence[Evaluation], held_out: Collection[str], saved: Container[int]) -> int | None:
    """Return the epoch of the best checkpoint by quality(), the earlier of equals; None if none is better than the start.

    saved: epochs whose checkpoint exists. A run that resumes from an earlier checkpoint may have lost the best one.
    """
    if not held_out or len(evaluations) < 2:
        return None
    best, epoch = 0.0, None
    for evaluation in (one for one in evaluations[1:] if one.epoch in saved):
        if (value := quality(evaluations[0], evaluation, held_out)) > best:
            best, epoch = value, evaluation.epoch
    return epoch
