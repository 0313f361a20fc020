"""Rewards: scorers, presets and the weighted sum (METHOD.md 3 and 5).

A scorer is an object with `score(prompts: list[str], images: Tensor [N, 3, H, W] float in [0, 1] or uint8) -> Tensor [N]
float32`. It may have `check_prompts(prompts: list[str])`, which raises UserError for prompts that it cannot judge. Training
and evaluation use the same classes; training hands over floats, evaluation uint8.
"""

import importlib
import math
from typing import Protocol

import torch

from fdfo.config import UserError
from fdfo.distributed import Job

CLIP_SCORERS = ("pickscore", "hpsv2", "clip_h14", "clip_l14", "scene_clip")
VLM_SCORERS = ("vlm_alignment", "vlm_quality", "vlm_photo")
SCORERS = (*CLIP_SCORERS, *VLM_SCORERS, "scene")
REWARD_PRESETS = {
    "pickscore": {"pickscore": 1.0},
    "vlm_alignment": {"vlm_alignment": 1.0},
    "combined": {"pickscore": 1.0, "vlm_alignment": 0.1},
    "scene": {"scene": 1.0},
}


class Scorer(Protocol):
    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor: ...


def reward_weights(preset: str, specs: tuple[str, ...]) -> dict[str, float]:
    """Scorer names and weights of a preset, or of NAME=WEIGHT specs where there are any. Raises UserError for bad ones."""
    if not specs:
        if preset not in REWARD_PRESETS:
            raise UserError(f"There is no reward preset {preset!r}: use one of {', '.join(REWARD_PRESETS)}, or --reward-specs.")
        return dict(REWARD_PRESETS[preset])
    weights: dict[str, float] = {}
    for spec in specs:
        name, _, weight = spec.rpartition("=")
        if name in weights:
            raise UserError(f"The reward {name} is given twice: add its weights up.")
        try:
            weights[name] = float(weight)
        except ValueError as error:
            raise UserError(f"The reward {spec!r} is not NAME=WEIGHT: write pickscore=1.0, for example.") from error
        if not math.isfinite(weights[name]):
            raise UserError(f"The weight of the reward {spec!r} is not a finite number: write pickscore=1.0, for example.")
        check_scorer_name(name)
    return weights


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
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"The scorer {name} cannot be imported ({error}): check MODULE:CLASS and where you start from."
        ) from error


def build_scorer(name: str, job: Job, vlm_model: str = "qwenvl-7b", vlm_use_fsdp: bool = False, training: bool = False) -> Scorer:
    """The scorer of a name on the job's device. training picks the training question of the VLM (METHOD.md 5)."""
    if ":" in name:
        return _own_class(name)(device=job.device)
    if name in CLIP_SCORERS:
        from rewards.clip import ClipScorer

        return ClipScorer(name, job.device)
    if name in VLM_SCORERS:
        from rewards.vlm import VlmScorer, question_for

        return VlmScorer(vlm_model, question_for(name, training), job, shard=vlm_use_fsdp)
    if name == "scene":
        from rewards.scene import SceneScorer

        return SceneScorer(job.device)
    raise UserError(f"There is no scorer {name!r}: use one of {', '.join(SCORERS)}, or MODULE:CLASS of your own.")


def training_label(name: str) -> str:
    """The name in logs of a scorer in training: the VLM's training values differ from its metric's (METHOD.md 5)."""
    return f"{name}_train" if name in VLM_SCORERS else name


class WeightedReward:
    """The reward of a run: a weighted sum of scorers."""

    def __init__(self, weights: dict[str, float], scorers: dict[str, Scorer]):
        self.weights, self.scorers = weights, scorers

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises UserError where a scorer that looks at prompts beforehand cannot judge one of them."""
        for scorer in self.scorers.values():
            if hasattr(scorer, "check_prompts"):
                scorer.check_prompts(prompts)

    def score(self, prompts: list[str], images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Raw scores of every scorer, [N] float32 each. Raises UserError when a scorer breaks its contract."""
        scores = {}
        for name, scorer in self.scorers.items():
            values = scorer.score(prompts, images)
            if not isinstance(values, torch.Tensor) or values.shape != (len(prompts),):
                got = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
                raise UserError(
                    f"The scorer {name} returned {got} for {len(prompts)} pictures: return a tensor with one number each."
                )
            scores[name] = values.to(images.device, torch.float32)
        return scores

    def total(self, scores: dict[str, torch.Tensor]) -> torch.Tensor:
        """The weighted sum of raw scores: [N]."""
        return sum(weight * scores[name] for name, weight in self.weights.items())
