"""Builds scorers and judges of pairs from their names, and weights from --reward-preset or --reward-specs (docs/method.md 5)."""

import importlib
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fdfo.config.errors import UserError, brief
from fdfo.distributed.job import Job
from rewards.pairs import PairScores
from rewards.presets import (
    CLIP_SCORERS,
    HUMAN,
    OCR_SCORERS,
    PAIR_JUDGES,
    REWARD_PRESETS,
    SCORERS,
    SET_SCORERS,
    VLM_PAIR,
    VLM_QUESTIONS,
    VLM_SCORERS,
    VLM_TRAINING_SCORERS,
    is_own_code,
    is_remote,
)
from rewards.remote.address import parse_address
from rewards.scorer import Offload, Scorer, SetScorer, own_errors, own_habits

if TYPE_CHECKING:
    from rewards.vlm.judge import Vlm


def reward_weights(preset: str, specs: tuple[str, ...]) -> dict[str, float]:
    """Return the weights of a preset, or of NAME=WEIGHT specs if there are any, by scorer or judge. Raises UserError for bad ones.

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
    """Split NAME=WEIGHT. Raises UserError unless the scorer or judge exists and the weight is a number."""
    name, _, text = spec.rpartition("=")
    try:
        weight = float(text)
    except ValueError as error:
        raise UserError(f"The reward {spec!r} is not NAME=WEIGHT: write pickscore=1.0, for example.") from error
    if not math.isfinite(weight):
        raise UserError(f"The weight of the reward {spec!r} is not a finite number: write pickscore=1.0, for example.")
    check_name(name, (*SCORERS, *PAIR_JUDGES))
    if name in SET_SCORERS:
        raise UserError(f"{name} compares the images of one prompt, so it is a metric and no reward: leave it out.")
    return name, weight


def check_name(name: str, known: Collection[str]) -> None:
    """Raise UserError unless the name is among the known ones, a server's address, or MODULE:CLASS of one that can be imported."""
    if is_remote(name):
        parse_address(name)
    elif is_own_code(name):
        _own_class(name)
    elif name not in known:
        raise UserError(
            f"There is no scorer {name!r}: use one of {', '.join(known)}, MODULE:CLASS of your own, or the address of a server."
        )


def check_metric_name(name: str) -> None:
    """Raise UserError unless the name is that of a scorer, which scores single images or those of one prompt."""
    if is_pair_judge(name):
        raise UserError(f"{name} compares the two images of a pair, so it is a reward and no metric: leave it out.")
    check_name(name, SCORERS)


def is_pair_judge(name: str) -> bool:
    """Return whether a name is that of a judge of pairs: of one's own, a class with `compare` and without `score`."""
    if not is_own_code(name):
        return name in PAIR_JUDGES
    own = _own_class(name)
    return callable(getattr(own, "compare", None)) and not hasattr(own, "score")


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
    """Make a scorer or judge of the user's own. Raises UserError if it cannot be made, or has no method for either."""
    with own_errors(f"{name} cannot be made", "its class is called with device=... alone"):
        scorer = _own_class(name)(device=device)
    if is_pair_judge(name):
        return PairScores(name, scorer)
    if not callable(getattr(scorer, "score", None)):
        raise UserError(
            f"The scorer {name} has no method score(prompts, images): add it; or compare(prompts, first, second), for a judge of pairs."
        )
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
    """Build the scorers of these names on the job's device; load the VLM once for all its questions. Judges of pairs become scorers
    of images that lie pair by pair. Raises UserError.

    offloaded: those whose models wait in host memory between their calls if there is a GPU. as_published: take the processors with
    which the published figures of metrics were made.
    """
    scorers, judge, offload = {}, None, Offload(job.device)
    offloaded = set(offloaded) if job.device.type == "cuda" else set()
    vlm_names = {*VLM_SCORERS, *VLM_TRAINING_SCORERS, VLM_PAIR}
    for name in names:
        if name in vlm_names:
            from rewards.vlm.judge import Vlm

            judge = judge or Vlm(vlm.model, job, vlm.use_fsdp, whole=bool(vlm_names & offloaded))
            scorer = build_vlm_scorer(name, judge)
        else:
            scorer = build_scorer(name, job, as_published)
        scorers[name] = offload(scorer) if name in offloaded else scorer
    return scorers


def build_vlm_scorer(name: str, vlm: "Vlm") -> Scorer:
    """Build one of the VLM's scorers, or its judge of pairs."""
    from rewards.vlm.judge import QUESTIONS, VlmScorer
    from rewards.vlm.pair import VlmPairJudge
    from rewards.vlm.questions import VlmQuestions

    if name == VLM_PAIR:
        return PairScores(name, VlmPairJudge(vlm))
    way = "training" if name in VLM_TRAINING_SCORERS else "metrics"
    if name.startswith(VLM_QUESTIONS):
        return VlmQuestions(vlm, way)
    return VlmScorer(vlm, QUESTIONS[name], way)


def build_scorer(name: str, job: Job, as_published: bool = False) -> Scorer | SetScorer:
    """Build one scorer that shares no model with others: any but the VLM's."""
    if is_own_code(name):
        return _own_scorer(name, job.device)
    if is_remote(name):
        return build_remote_scorer(name)
    if name in CLIP_SCORERS:
        from rewards.scorers.clip import CLIP_MODELS, PUBLISHED_PROCESSORS, ClipScorer

        model, processor = CLIP_MODELS[name]
        return ClipScorer(model, PUBLISHED_PROCESSORS.get(name, processor) if as_published else processor, job.device)
    if name == "scene":
        from rewards.scorers.scene import SceneScorer

        return SceneScorer(job.device)
    if name in OCR_SCORERS:
        from rewards.scorers.ocr import READERS, OcrScorer

        return OcrScorer(*READERS[name])
    if name == HUMAN:
        from rewards.human import HumanJudge

        return PairScores(name, HumanJudge(job))
    if name == "pixel_diversity":
        from rewards.scorers.pixel_diversity import PixelDiversity

        return PixelDiversity()
    assert name == "dreamsim_diversity", name
    from rewards.scorers.dreamsim import DreamSimDiversity

    return DreamSimDiversity(job)


def build_remote_scorer(name: str) -> Scorer:
    """Build a scorer that asks the server at an address."""
    address = parse_address(name)
    if address.model is None:
        from rewards.remote.http import HttpScorer

        return HttpScorer(address.url)
    from rewards.remote.chat import ChatScorer

    return ChatScorer(address.url, address.model)
