"""Rewards: scorers, presets and the weighted sum (METHOD.md 3 and 5).

A scorer is an object with `score(prompts: list[str], images: Tensor [N, 3, H, W] float in [0, 1] or uint8) -> Tensor [N]
float32`. It may have `check_prompts(prompts: list[str])`, which raises UserError for prompts that it cannot judge,
`description`, a text for the log, and `model`, a torch.nn.Module that waits in host memory with --offload-scorers, or where
evaluations alone use it. Training and evaluation use the same classes; training hands over floats, evaluation uint8.

A set scorer compares the pictures of one prompt with each other. It has `score_sets(images: Tensor [N, 3, H, W] uint8,
counts: list[int]) -> Tensor [P] float32`, one number a prompt, and is a metric only.
"""

import contextlib
import importlib
import math
import sys
import traceback
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch

from fdfo.config import UserError
from fdfo.distributed import Job
from rewards.offload import Offload

CLIP_SCORERS = ("pickscore", "hpsv2", "clip_h14", "clip_l14", "scene_clip")
VLM_SCORERS = ("vlm_alignment", "vlm_quality", "vlm_photo")
VLM_TRAINING_SCORERS = tuple(f"{name}_train" for name in VLM_SCORERS)  # question and pictures as training has them
SET_SCORERS = ("dreamsim_diversity", "pixel_diversity")
SCORERS = (*CLIP_SCORERS, *VLM_SCORERS, *VLM_TRAINING_SCORERS, "scene", *SET_SCORERS)
REWARD_PRESETS = {
    "pickscore": {"pickscore": 1.0},
    "vlm_alignment": {"vlm_alignment": 1.0},
    "combined": {"pickscore": 1.0, "vlm_alignment": 0.1},
    "scene": {"scene": 1.0},
}


class Scorer(Protocol):
    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor: ...


class SetScorer(Protocol):
    def score_sets(self, images: torch.Tensor, counts: list[int]) -> torch.Tensor: ...


def reward_weights(preset: str, specs: tuple[str, ...]) -> dict[str, float]:
    """Scorers and weights of a preset, or of NAME=WEIGHT specs where there are any. Raises UserError for bad ones.

    The VLM's scorers come out under the names of their training way, whose values differ from the metrics' (METHOD.md 5).
    """
    if not specs and preset not in REWARD_PRESETS:
        raise UserError(f"There is no reward preset {preset!r}: use one of {', '.join(REWARD_PRESETS)}, or --reward-specs.")
    pairs = [parse_spec(spec) for spec in specs] or REWARD_PRESETS[preset].items()
    weights: dict[str, float] = {}
    for name, weight in pairs:
        label = f"{name}_train" if name in VLM_SCORERS else name
        if label in weights:
            raise UserError(f"The reward {name} is given twice: add its weights up.")
        weights[label] = weight
    return weights


def parse_spec(spec: str) -> tuple[str, float]:
    """NAME=WEIGHT -> name and weight. Raises UserError unless the scorer exists and the weight is a number."""
    name, _, text = spec.rpartition("=")
    try:
        weight = float(text)
    except ValueError as error:
        raise UserError(f"The reward {spec!r} is not NAME=WEIGHT: write pickscore=1.0, for example.") from error
    if not math.isfinite(weight):
        raise UserError(f"The weight of the reward {spec!r} is not a finite number: write pickscore=1.0, for example.")
    check_scorer_name(name)
    if name in SET_SCORERS:
        raise UserError(f"{name} compares the pictures of one prompt, so it is a metric and no reward: leave it out.")
    return name, weight


def check_scorer_name(name: str) -> None:
    """Raises UserError unless the name is a scorer's, or MODULE:CLASS of one that can be imported."""
    if ":" in name:
        _own_class(name)
    elif name not in SCORERS:
        raise UserError(f"There is no scorer {name!r}: use one of {', '.join(SCORERS)}, or MODULE:CLASS of your own.")


def _own_class(name: str) -> type:
    module_name, _, class_name = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        raise UserError(
            f"The scorer {name} cannot be imported ({reason(error)}): check MODULE:CLASS and where you start from."
        ) from error


@contextlib.contextmanager
def _own_errors(failure: str, advice: str) -> Iterator[None]:
    """Turns whatever a scorer raises inside, but its own UserErrors, into a sentence that begins with the scorer's name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"The scorer {failure} ({reason(error)}): {advice}.") from error


def _own_scorer(name: str, device: torch.device) -> Scorer | SetScorer:
    """A scorer of the user's own. Raises UserError where it cannot be made, or cannot score."""
    with _own_errors(f"{name} cannot be made", "its class is called with device=... alone"):
        scorer = _own_class(name)(device=device)
    if not callable(getattr(scorer, "score", None)):
        raise UserError(f"The scorer {name} has no method score(prompts, images): add it.")
    return scorer


def build_scorers(
    names: Iterable[str], job: Job, vlm_model: str = "qwenvl-7b", vlm_use_fsdp: bool = False, waiting: Collection[str] = ()
) -> dict[str, Scorer | SetScorer]:
    """The scorers of these names on the job's device; the VLM is loaded once for all its questions. Raises UserError.

    waiting: those whose models wait in host memory between their calls, where there is a GPU, and need not fit there together.
    """
    scorers, vlm, offload = {}, None, Offload(job.device)
    waiting = waiting if job.device.type == "cuda" else ()
    for name in names:
        if name in (*VLM_SCORERS, *VLM_TRAINING_SCORERS):
            from rewards.vlm import QUESTIONS, Vlm, VlmScorer

            vlm = vlm or Vlm(vlm_model, job, vlm_use_fsdp, whole=bool({*VLM_SCORERS, *VLM_TRAINING_SCORERS} & set(waiting)))
            way = "training" if name in VLM_TRAINING_SCORERS else "metrics"
            scorer = VlmScorer(vlm, QUESTIONS[name], way)
        else:
            scorer = build_scorer(name, job)
        scorers[name] = offload(scorer) if name in waiting else scorer
    return scorers


def build_scorer(name: str, job: Job) -> Scorer | SetScorer:
    """One scorer that shares nothing with others: any but the VLM's."""
    if ":" in name:
        return _own_scorer(name, job.device)
    if name in CLIP_SCORERS:
        from rewards.clip import CLIP_MODELS, ClipScorer

        return ClipScorer(*CLIP_MODELS[name], job.device)
    if name == "scene":
        from rewards.scene import SceneScorer

        return SceneScorer(job.device)
    if name == "pixel_diversity":
        from rewards.pixel_diversity import PixelDiversity

        return PixelDiversity()
    assert name == "dreamsim_diversity", name
    from rewards.dreamsim import DreamSimDiversity

    return DreamSimDiversity(job)


def describe(scorers: dict[str, Scorer | SetScorer]) -> dict[str, str]:
    """What each scorer is, for logs and tables."""
    return {name: getattr(scorer, "description", type(scorer).__name__) for name, scorer in scorers.items()}


def check_prompts(scorers: dict[str, Scorer | SetScorer], prompts: list[str]) -> None:
    """Raises UserError where a scorer that looks at prompts beforehand cannot judge one of them."""
    for name, scorer in scorers.items():
        if hasattr(scorer, "check_prompts"):
            with _own_errors(f"{name} failed in check_prompts", "mend it"):
                scorer.check_prompts(prompts)


def checked_scores(name: str, scorer: Scorer, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
    """Scores of one scorer: [N] float32 on the CPU. Raises UserError when it breaks its contract, or fails twice in a row.

    A failure such as a lost connection may pass, so a scorer is tried again once; not where several ranks share one model,
    since the others would be at another place.
    """
    version = images._version
    try:
        values = scorer.score(prompts, images)
    except UserError:
        raise
    except Exception as error:
        if getattr(getattr(scorer, "vlm", None), "sharded", False):
            raise UserError(f"The scorer {name} failed ({reason(error)}): mend it, then resume.") from error
        print(f"warning: the scorer {name} failed ({reason(error)}) and is tried again", file=sys.stderr, flush=True)
        try:
            values = scorer.score(prompts, images)
        except Exception as again:
            raise UserError(f"The scorer {name} failed twice in a row ({reason(again)}): mend it, then resume.") from again
    if images._version != version:
        raise UserError(f"The scorer {name} writes into its pictures, which others score too: let it work on a copy.")
    if not isinstance(values, torch.Tensor) or values.shape != (len(prompts),):
        got = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise UserError(f"The scorer {name} returned {got} for {len(prompts)} pictures: return a tensor with one number each.")
    return values.to("cpu", torch.float32)


def reason(error: Exception) -> str:
    """An exception in half a line, with the place that raised it."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text}, in {Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else text


class WeightedReward:
    """The reward of a run: a weighted sum of scorers."""

    def __init__(self, weights: dict[str, float], scorers: dict[str, Scorer]):
        self.weights, self.scorers = weights, scorers

    def score(self, prompts: list[str], images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Raw scores of every scorer, [N] float32 each, on the images' device. Raises UserError for a broken scorer."""
        return {name: checked_scores(name, scorer, prompts, images).to(images.device) for name, scorer in self.scorers.items()}

    def total(self, scores: dict[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum of raw scores: [N]."""
        return sum(weight * scores[name] for name, weight in self.weights.items())
