"""Builds scorers from their names, and weights from --reward-preset or --reward-specs (docs/method.md 5)."""

import importlib
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from fdfo.config.errors import UserError, brief
from fdfo.distributed.job import Job
from rewards.presets import CLIP_SCORERS, REWARD_PRESETS, SCORERS, SET_SCORERS, VLM_SCORERS, VLM_TRAINING_SCORERS
from rewards.scorer import Offload, Scorer, SetScorer, own_errors, own_habits


def reward_weights(preset: str, specs: tuple[str, ...]) -> dict[str, float]:
    """Return the weights of a preset, or of NAME=WEIGHT specs if there are any, by scorer. Raises UserError for bad ones.

    The VLM's scorers get the names of their training variant, whose values differ from the metrics' (docs/method.md 5).
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
    """Split NAME=WEIGHT. Raises UserError unless the scorer exists and the weight is a number."""
    name, _, text = spec.rpartition("=")
    try:
        weight = float(text)
    except ValueError as error:
        raise UserError(f"The reward {spec!r} is not NAME=WEIGHT: write pickscore=1.0, for example.") from error
    if not math.isfinite(weight):
        raise UserError(f"The weight of the reward {spec!r} is not a finite number: write pickscore=1.0, for example.")
    check_scorer_name(name)
    if name in SET_SCORERS:
        raise UserError(f"{name} compares the images of one prompt, so it is a metric and no reward: leave it out.")
    return name, weight


def check_scorer_name(name: str) -> None:
    """Raise UserError unless the name is a scorer's, or MODULE:CLASS of one that can be imported."""
    if ":" in name:
        _own_class(name)
    elif name not in SCORERS:
        raise UserError(f"There is no scorer {name!r}: use one of {', '.join(SCORERS)}, or MODULE:CLASS of your own.")


def _own_class(name: str) -> type:
    module_name, _, class_name = name.partition(":")
    try:
        with own_habits():
            return getattr(importlib.import_module(module_name), class_name)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        raise UserError(
            f"The scorer {name} cannot be imported ({brief(error)}): check MODULE:CLASS and where you start from."
        ) from error


def _own_scorer(name: str, device: torch.device) -> Scorer | SetScorer:
    """Make a scorer of the user's own. Raises UserError if it cannot be made, or has no score method."""
    with own_errors(f"{name} cannot be made", "its class is called with device=... alone"):
        scorer = _own_class(name)(device=device)
    if not callable(getattr(scorer, "score", None)):
        raise UserError(f"The scorer {name} has no method score(prompts, images): add it.")
    return scorer


@dataclass(frozen=True)
class VlmSettings:
    """Which VLM judges, and whether it may be sharded."""

    model: str = "qwenvl-7b"
    use_fsdp: bool = False


def build_scorers(
    names: Iterable[str],
    job: Job,
    vlm: VlmSettings = VlmSettings(),
    offloaded: Collection[str] = (),
    as_published: bool = False,
) -> dict[str, Scorer | SetScorer]:
    """Build the scorers of these names on the job's device; load the VLM once for all its questions. Raises UserError.

    offloaded: those whose models wait in host memory between their calls if there is a GPU. as_published: take the processors with
    which the published figures of metrics were made.
    """
    scorers, judge, offload = {}, None, Offload(job.device)
    offloaded = set(offloaded) if job.device.type == "cuda" else set()
    vlm_names = {*VLM_SCORERS, *VLM_TRAINING_SCORERS}
    for name in names:
        if name in vlm_names:
            from rewards.vlm import QUESTIONS, Vlm, VlmScorer

            judge = judge or Vlm(vlm.model, job, vlm.use_fsdp, whole=bool(vlm_names & offloaded))
            scorer = VlmScorer(judge, QUESTIONS[name], "training" if name in VLM_TRAINING_SCORERS else "metrics")
        else:
            scorer = build_scorer(name, job, as_published)
        scorers[name] = offload(scorer) if name in offloaded else scorer
    return scorers


def build_scorer(name: str, job: Job, as_published: bool = False) -> Scorer | SetScorer:
    """Build one scorer that shares no model with others: any but the VLM's."""
    if ":" in name:
        return _own_scorer(name, job.device)
    if name in CLIP_SCORERS:
        from rewards.clip import CLIP_MODELS, PUBLISHED_PROCESSORS, ClipScorer

        model, processor = CLIP_MODELS[name]
        return ClipScorer(model, PUBLISHED_PROCESSORS.get(name, processor) if as_published else processor, job.device)
    if name == "scene":
        from rewards.scene import SceneScorer

        return SceneScorer(job.device)
    if name == "pixel_diversity":
        from rewards.pixel_diversity import PixelDiversity

        return PixelDiversity()
    assert name == "dreamsim_diversity", name
    from rewards.dreamsim import DreamSimDiversity

    return DreamSimDiversity(job)
