"""Means, standard errors and paired changes of scores."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

REWARD = "reward"  # name of the weighted sum that is trained on, among an evaluation's scores


@dataclass(frozen=True)
class Summary:
    """Mean over prompts of each prompt's mean score, and its standard error: images of one prompt are not independent."""

    mean: float
    standard_error: float  # NaN for a single prompt
    prompts: int
    left_out: int  # prompts without a finite score


@dataclass(frozen=True)
class Change:
    """Two means over the prompts that have both scores, and the standard error of the paired difference."""

    before: float
    after: float
    difference: float
    error: float
    count: int


@dataclass(frozen=True)
class Evaluation:
    """Scores of the held-out prompts at one epoch: the same prompts and seeds at every epoch."""

    epoch: int
    scores: dict[str, list[float]]  # by name: one number per prompt, NaN if it has none


def prompt_means(scores: list[list[float]]) -> list[float]:
    """Return the mean score of every prompt; NaN for one that has none, or one that is not finite."""
    return [sum(values) / len(values) if values else math.nan for values in scores]


def summarise(means: Sequence[float]) -> Summary:
    """Summarise one number per prompt, leaving out those that are not finite."""
    finite = [mean for mean in means if math.isfinite(mean)]
    return Summary(mean(finite), standard_error(finite), len(finite), len(means) - len(finite))


def paired_change(before: Sequence[float], after: Sequence[float]) -> Change:
    """Compare two scores of the same prompts, over the prompts that have both."""
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if math.isfinite(a) and math.isfinite(b)]
    firsts, seconds = [a for a, _ in pairs], [b for _, b in pairs]
    first, second = mean(firsts), mean(seconds)
    return Change(first, second, second - first, standard_error([b - a for a, b in pairs]), len(pairs))


def score_warning(name: str, values: Sequence[float]) -> str | None:
    """Return a sentence on scores that say nothing about the images, or None. values: one for each of several images or prompts."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return f"{name} gave no image a finite score"
    return (
        f"{name} gave all images the same score {finite[0]:g}, so it says nothing"
        if len(finite) > 1 and len({*finite}) == 1
        else None
    )


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of independent values; NaN for fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def evaluation_of(line: dict) -> Evaluation:
    """Return the evaluation in a line of the log, where null stands for NaN."""
    scores = {name: [math.nan if value is None else float(value) for value in values] for name, values in line["scores"].items()}
    return Evaluation(line["epoch"], scores)
