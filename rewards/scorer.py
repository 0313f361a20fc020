"""What a scorer is, and the weighted sum of scorers that is the reward (docs/method.md 3 and 5).

A scorer is an object with `score(prompts: list[str], images: Tensor [N, 3, H, W] float in [0, 1] or uint8) -> Tensor [N]
float32`. It may have `check_prompts(prompts: list[str])`, which raises UserError for prompts that it cannot judge,
`description`, a text for the log, and `model`, a torch.nn.Module that waits in host memory if the scorer is offloaded. Training
and evaluation use the same classes; training passes floats, evaluation uint8.

A judge of pairs compares two images, and is turned into a scorer of images that lie pair by pair (pairs.py).

A set scorer compares the images of one prompt with each other. It has `score_sets(images: Tensor [N, 3, H, W] uint8,
counts: list[int]) -> Tensor [P] float32`, one number per prompt, and is a metric only.
"""

import contextlib
import sys
import traceback
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from fdfo.config.errors import UserError, brief
from fdfo.model.acceleration import PinnedWeights
from rewards.presets import is_own_code


class Scorer(Protocol):
    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor: ...


class SetScorer(Protocol):
    def score_sets(self, images: torch.Tensor, counts: list[int]) -> torch.Tensor: ...


@contextlib.contextmanager
def own_errors(failure: str, advice: str) -> Iterator[None]:
    """Turn whatever a scorer raises inside, but its own UserErrors, into a sentence that begins with the scorer's name."""
    try:
        with own_habits():
            yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"The scorer {failure} ({reason(error)}): {advice}.") from error


@contextlib.contextmanager
def own_habits() -> Iterator[None]:
    """Restore afterwards what a scorer may set for the whole process: whether gradients are on, and the default type."""
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)


def describe(scorers: dict[str, Scorer | SetScorer]) -> dict[str, str]:
    """Return what each scorer is, for logs and tables."""
    return {name: str(getattr(scorer, "description", type(scorer).__name__)) for name, scorer in scorers.items()}


def check_prompts(scorers: dict[str, Scorer | SetScorer], prompts: list[str]) -> None:
    """Raise UserError if a scorer that checks prompts beforehand cannot judge one of them."""
    for name, scorer in scorers.items():
        if hasattr(scorer, "check_prompts"):
            with own_errors(f"{name} failed in check_prompts", "fix it"):
                scorer.check_prompts(prompts)


def checked_scores(name: str, scorer: Scorer, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
    """Score with one scorer: [N] float32 on the CPU. Raises UserError if it breaks its contract, or fails twice in a row.

    A failure such as a lost connection may pass, so a scorer is tried again once. Not if several ranks share one model: the
    others would not repeat their part. A scorer of one's own gets copies, so that it cannot change what others score.
    """

    def score() -> torch.Tensor:
        with own_habits():
            return scorer.score(list(prompts), images.clone()) if is_own_code(name) else scorer.score(prompts, images)

    try:
        values = score()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if getattr(getattr(scorer, "vlm", None), "sharded", False):
            raise UserError(f"The scorer {name} failed ({reason(error)}): fix it, then resume.") from error
        print(f"warning: the scorer {name} failed ({reason(error)}) and is tried again", file=sys.stderr, flush=True)
        try:
            values = score()
        except (Exception, SystemExit) as again:
            raise UserError(f"The scorer {name} failed twice in a row ({reason(again)}): fix it, then resume.") from again
    check_one_number_each(f"scorer {name}", values, len(prompts), "images")
    return values.to("cpu", torch.float32)


def check_one_number_each(who: str, values: object, count: int, things: str) -> None:
    """Raise UserError unless the values are a tensor [count]. who returned them, for so many things."""
    if not isinstance(values, torch.Tensor) or values.shape != (count,):
        got = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise UserError(f"The {who} returned {got} for {count} {things}: return a tensor with one number each.")


def reason(error: BaseException) -> str:
    """Return an exception as half a line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{brief(error)}, in {Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else brief(error)


class WeightedReward:
    """The reward of a run: a weighted sum of scorers, some of which may be judges of pairs."""

    def __init__(self, weights: dict[str, float], scorers: dict[str, Scorer], judges: Collection[str] = ()):
        """judges: names of those that compare the images of a pair, and so cannot score a single image."""
        self.weights, self.scorers, self.judges = weights, scorers, frozenset(judges)

    @property
    def of_images(self) -> dict[str, Scorer]:
        """The scorers that score single images."""
        return {name: scorer for name, scorer in self.scorers.items() if name not in self.judges}

    def score(self, prompts: list[str], images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the raw scores of every scorer, [N] float32 each, on the images' device: prompts [N], images [N, 3, H, W].

        Judges need the two images of a pair in rows 2k and 2k + 1. Raises UserError for a broken scorer.
        """
        return {name: checked_scores(name, scorer, prompts, images).to(images.device) for name, scorer in self.scorers.items()}

    def total(self, scores: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the weighted sum of raw scores: [N]."""
        return sum(weight * scores[name] for name, weight in self.weights.items())


@dataclass(frozen=True)
class Judges:
    """All scorers of a run: those of the reward, and those of evaluations that are not trained on."""

    reward: WeightedReward
    metrics: dict[str, Scorer | SetScorer]


class OffloadedScorer:
    """A scorer whose model is on the device only while it scores. All else, the scores included, is the scorer's own."""

    def __init__(self, scorer: object, weights: PinnedWeights):
        self.scorer, self.weights = scorer, weights

    def __getattr__(self, name: str) -> object:
        return getattr(self.scorer, name)

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        """Score as the scorer itself: prompts [N], images [N, 3, H, W] -> [N] float32."""
        with self.weights.loaded():
            return self.scorer.score(prompts, images)

    def score_sets(self, images: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Score as the set scorer itself: images [N, 3, H, W], counts [P] -> [P] float32."""
        with self.weights.loaded():
            return self.scorer.score_sets(images, counts)


class Offload:
    """Moves scorers' models to host memory, each model once, however many scorers share it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.waiting: dict[nn.Module, PinnedWeights] = {}

    def __call__(self, scorer: object) -> object:
        """Return the scorer, offloaded if it has a `model`, a module whose parameters are all on the device."""
        model = getattr(scorer, "model", None)
        if not isinstance(model, nn.Module):
            return scorer
        if model not in self.waiting:
            if any(parameter.device != self.device for parameter in model.parameters()):
                return scorer
            self.waiting[model] = PinnedWeights([model], self.device)
        return OffloadedScorer(scorer, self.waiting[model])
