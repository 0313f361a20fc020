"""Signs that a run does not learn, looked for once an epoch."""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fdfo.rollout import MOST_DROPPED
from fdfo.update import RATIO_TOLERANCE, StepStats

LEAST_DIFFERING = 0.01  # share of pairs whose rewards differ
MOST_CLIPPED = 0.9  # share of samples
RATIOS = (0.5, 2.0)  # mean of an optimizer step
MOST_ONE_COLOUR = 0.5  # share of pictures
ONE_COLOUR = 1 / 255  # largest spread of a picture of one colour, in each channel
LARGEST_JUMP = 100  # times the median of the gradient norms before
MEDIAN_OF, MEDIAN_NEEDS = 100, 8  # optimizer steps


@dataclass(frozen=True)
class Signs:
    """What an epoch says about its health, over the whole job."""

    differing_pairs: float  # share
    dropped_pairs: float  # share
    one_colour: float  # share of pictures
    adapter_change: float  # norm of the adapter's change in the epoch, relative to the adapter
    steps: list[StepStats]


class Health:
    """The checks, with the gradient norms of the last optimizer steps."""

    def __init__(self, precision: str, norms: Iterable[float]):
        """norms: the finite ones of a resumed run's steps so far."""
        self.precision = precision
        self.norms = deque(norms, MEDIAN_OF)

    def check(self, signs: Signs) -> list[str]:
        """One sentence for every sign that something is wrong, with what to look at."""
        found = []
        if not signs.differing_pairs > LEAST_DIFFERING:
            found.append(
                f"{signs.differing_pairs:.1%} of the pairs differ in reward: the reward is saturated or the churn too weak"
            )
        if signs.dropped_pairs > MOST_DROPPED:
            found.append(
                f"{signs.dropped_pairs:.1%} of the pairs were dropped: a scorer or the sampling gives numbers not finite"
            )
        if signs.one_colour > MOST_ONE_COLOUR:
            found.append(f"{signs.one_colour:.1%} of the pictures are of one colour: the model has collapsed, go back")
        if not signs.adapter_change > 0:
            found.append("the adapter has not moved: look at the learning rate and the skipped steps")
        return found + self.check_ratios(signs.steps) + self.check_norms(signs.steps)

    def check_ratios(self, steps: list[StepStats]) -> list[str]:
        found, first = [], steps[0].ratio_first
        if not abs(first - 1) <= RATIO_TOLERANCE[self.precision]:
            found.append(f"the ratio at unchanged weights is {first:.4f} instead of 1: sampling and training disagree")
        worst = max((step.ratio_mean for step in steps), key=lambda ratio: abs(math.log(ratio)) if ratio > 0 else math.inf)
        if not RATIOS[0] <= worst <= RATIOS[1]:
            found.append(f"a step's mean ratio is {worst:.3g}: lower --train.learning-rate")
        clipped = max(step.clipfrac for step in steps)
        if not clipped <= MOST_CLIPPED:
            found.append(f"a step's clipfrac is {clipped:.2f}: lower --train.learning-rate")
        return found

    def check_norms(self, steps: list[StepStats]) -> list[str]:
        """Gradient norms of 0, and those far above the running median, which then takes them in."""
        found = []
        for number, step in enumerate(steps, start=1):
            if step.grad_norm == 0:
                found.append(f"the gradient norm of step {number} is 0: no sample of it pulls the adapter anywhere")
            if len(self.norms) >= MEDIAN_NEEDS and step.grad_norm > LARGEST_JUMP * statistics.median(self.norms):
                middle = statistics.median(self.norms)
                found.append(
                    f"the gradient norm of step {number} is {step.grad_norm:.3g} where {middle:.3g} is usual: a reward may have jumped"
                )
            if math.isfinite(step.grad_norm):
                self.norms.append(step.grad_norm)
        return found


def one_colour(images: torch.Tensor) -> torch.Tensor:
    """1 for every picture [N, 3, H, W] that is of one colour, else 0: [N]."""
    pixels = images.flatten(2)
    return ((pixels.amax(2) - pixels.amin(2)) < ONE_COLOUR).all(1).float()


def relative_change(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """Norm of the change over the norm of what it started from."""
    change = torch.stack(torch._foreach_norm(torch._foreach_sub(after, before))).norm()
    return float(change / torch.stack(torch._foreach_norm(before)).norm())
