"""Checks once per epoch whether a run learns, and computes the numbers of the epoch's log line."""

import math
import statistics
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fdfo.config.errors import UserError
from fdfo.distributed.job import Job
from fdfo.evaluation.statistics import mean
from rewards.presets import HUMAN

RATIO_TOLERANCE = {"fp32": 1e-3, "fp16": 1e-3, "bf16": 1e-2}
MOST_DROPPED = 0.05  # share of images or pairs without a finite score or latent, above which a run cannot be trained
LEAST_DIFFERING = 0.01  # share of pairs whose rewards differ
MOST_CLIPPED = 0.9  # share of samples
RATIOS = (0.5, 2.0)  # mean of an optimizer step
MOST_ONE_COLOUR = 0.5  # share of images
LARGEST_JUMP = 100  # times the median of the gradient norms before
MEDIAN_OF, MEDIAN_NEEDS = 100, 8  # optimizer steps


@dataclass
class StepStats:
    """What one optimizer step did, over the whole job."""

    loss: float
    clipfrac: float
    ratio_mean: float
    ratio_first: float  # the sample's ratio that is farthest from 1; 1 at the first step of an epoch
    grad_norm: float
    loss_scale: float
    applied: bool


@dataclass(frozen=True)
class EpochScores:
    """What an epoch's images were given, over the whole job, in global order; both branches of a pair lie together."""

    scores: dict[str, list[float]]  # 2P numbers each
    reward: list[float]  # [2P]
    dropped: list[bool]  # [2P]
    one_colour: list[float]  # [2P], 1 for an image of one colour
    judges: Collection[str] = ()  # those of the scores that compare pairs: v / 2 and -v / 2 for a pair's value v

    @property
    def unjudged(self) -> list[bool]:
        """For each image, whether a judge left its pair out: [2P]."""
        return [any(math.isnan(self.scores[name][i]) for name in self.judges) for i in range(len(self.dropped))]

    @property
    def broken(self) -> float:
        """Share of pairs that were dropped though every judge has judged them."""
        return mean([dropped and not unjudged for dropped, unjudged in zip(self.dropped, self.unjudged, strict=True)])


def epoch_numbers(epoch: EpochScores, steps: Sequence[StepStats], adapter_change: float) -> dict[str, object]:
    """Return the numbers of an epoch's log line. adapter_change: norm of the adapter's change, relative to the adapter.

    The mean of a judge's values is 0 by construction, so there is none; the reward has one if it has a scorer of images.
    """
    dropped = torch.tensor(epoch.dropped)
    reward = torch.tensor(epoch.reward, dtype=torch.float64)
    pairs = reward.view(-1, 2)[~dropped[::2]]  # [P, 2]
    of_images = {name: values for name, values in epoch.scores.items() if name not in epoch.judges}
    level = {"reward_mean": float(pairs.mean()), "reward_std": float(pairs.std())} if of_images else {}
    return level | {
        "scores": {name: mean([value for value in values if math.isfinite(value)]) for name, values in of_images.items()},
        "differing_pairs": float((pairs[:, 0] != pairs[:, 1]).double().mean()),
        "reward_difference": float((pairs[:, 0] - pairs[:, 1]).abs().mean()),
        "dropped_pairs": int(dropped.sum()) // 2,
        **({"unjudged_pairs": sum(epoch.unjudged) // 2} if epoch.judges else {}),
        "skipped_steps": sum(not step.applied for step in steps),
        "clipfrac": mean([step.clipfrac for step in steps]),
        "loss": mean([step.loss for step in steps]),
        "grad_norm": mean([step.grad_norm for step in steps]),
        "ratio_first": steps[0].ratio_first,
        "adapter_change": adapter_change,
    }


class Health:
    """The checks of an epoch, with the gradient norms of the last optimizer steps."""

    def __init__(self, precision: str, norms: Iterable[float]):
        """norms: the finite ones of a resumed run's steps so far."""
        self.precision = precision
        self.norms = deque(norms, MEDIAN_OF)

    def check(self, numbers: Mapping[str, float], dropped: float, plain: float, steps: Sequence[StepStats]) -> list[str]:
        """Return one sentence for every sign that something is wrong, with what to look at.

        numbers: of epoch_numbers; dropped: share of pairs, without those that a judge left out; plain: share of images of one colour.
        """
        found, differing = [], numbers["differing_pairs"]
        if not differing > LEAST_DIFFERING:
            found.append(f"{differing:.1%} of the pairs differ in reward: the reward is saturated or the churn too weak")
        if dropped > MOST_DROPPED:
            found.append(f"{dropped:.1%} of the pairs were dropped: a scorer or the sampling gives numbers that are not finite")
        if plain > MOST_ONE_COLOUR:
            found.append(
                f"{plain:.1%} of the images are of one colour: the model has collapsed, go back to an earlier checkpoint"
            )
        if not numbers["adapter_change"] > 0:
            found.append("the adapter has not moved: look at the learning rate and the skipped steps")
        return found + self.check_ratios(steps) + self.check_norms(steps)

    def check_ratios(self, steps: Sequence[StepStats]) -> list[str]:
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

    def check_norms(self, steps: Sequence[StepStats]) -> list[str]:
        """Warn of gradient norms of 0, and of those far above the running median, which includes them afterwards."""
        found = []
        for number, step in enumerate(steps, start=1):
            if step.grad_norm == 0:
                found.append(f"the gradient norm of step {number} is 0: none of its samples pulls the adapter anywhere")
            if len(self.norms) >= MEDIAN_NEEDS and step.grad_norm > LARGEST_JUMP * statistics.median(self.norms):
                middle = statistics.median(self.norms)
                found.append(
                    f"the gradient norm of step {number} is {step.grad_norm:.3g}, the median is {middle:.3g}: a reward may have jumped"
                )
            if math.isfinite(step.grad_norm):
                self.norms.append(step.grad_norm)
        return found


def check_first_scores(scores: Mapping[str, Sequence[float]], judges: Collection[str] = ()) -> None:
    """Stop a run whose scorers do not work, before its first update: scores of all images of the job, by scorer.

    Of those that are judges of pairs, only one that finds no pair to differ does not work. People may call every pair a tie.
    """
    for name, values in scores.items():
        finite = np.isfinite(values)
        if name in judges:
            if name != HUMAN and finite.any() and not np.asarray(values)[finite].any():
                raise UserError(f"The judge {name} called all {finite.sum() // 2} pairs a tie: fix the judge.")
            continue
        if not finite.mean() >= 1 - MOST_DROPPED:
            count = int((~finite).sum())
            raise UserError(f"The scorer {name} gave {count} of {len(values)} images a score that is not finite: fix the scorer.")
        kept = np.asarray(values)[finite]
        if np.ptp(kept) == 0:
            raise UserError(f"The scorer {name} gave all {len(kept)} images the same score {kept[0]}: fix the scorer.")


def check_pairs_left(job: Job, epoch: int, dropped: torch.Tensor, finite: torch.Tensor, scores: dict[str, torch.Tensor]) -> None:
    """Raise UserError if no pair of the job has finite images and rewards; it names the scorer where one is to blame.

    dropped, finite: [2P] bool, this rank's dropped branches and finite images; scores: [2P] each.
    """
    if not all(job.gather_objects(bool(dropped.all()))):
        return
    failing = {name for name, values in scores.items() if not values[finite].isfinite().all()}
    if failing := set().union(*job.gather_objects(failing)):
        raise UserError(
            f"In epoch {epoch} no pair has finite rewards, though there are finite images: {' and '.join(sorted(failing))} gives scores "
            "that are not finite; fix the scorer, then resume."
        )
    raise UserError(
        f"No pair of epoch {epoch} has finite images, so the adapter has broken: resume from an earlier checkpoint with a lower "
        "--train.learning-rate."
    )


def check_images_left(job: Job, epoch: int, finite: torch.Tensor) -> None:
    """Raise UserError if no held-out image of the job is finite. finite [N] bool: this rank's."""
    if not any(job.gather_objects(bool(finite.any()))):
        raise UserError(
            f"No held-out image is finite after epoch {epoch}, so the adapter has broken: resume from an earlier checkpoint with a lower "
            "--train.learning-rate."
        )


def check_ratio(ratio: float, precision: str) -> None:
    """Raise UserError if sampling and training see different velocities: at unchanged weights the ratio is 1 (docs/method.md 4)."""
    if not abs(ratio - 1) <= RATIO_TOLERANCE[precision]:
        raise UserError(
            f"The surrogate ratio at unchanged weights is {ratio:.6f} instead of 1: sampling and training disagree, so this run "
            "would learn noise; use --precision fp32 or fp16, and the same model and libraries on all processes."
        )


def check_adapter_moved(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> None:
    """Raise UserError if the first update left the LoRA's B matrices as they were."""
    if all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        raise UserError(
            "The first update left the adapter where it was: check the learning rate and that pairs differ in reward."
        )


def relative_change(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """Return the norm of the change over the norm of what it started from."""
    change = torch.stack(torch._foreach_norm(torch._foreach_sub(after, before))).norm()
    return float(change / torch.stack(torch._foreach_norm(before)).norm())


def gather_scores(job: Job, scores: dict[str, torch.Tensor]) -> dict[str, list]:
    """Return the scores of all images of the job, in global order, on every rank."""
    parts = job.gather_objects({name: values.tolist() for name, values in scores.items()})
    return {name: [value for part in parts for value in part[name]] for name in scores}
