"""Evaluation during training: which prompts are held out, who judges their images, and their scores."""

import math
from dataclasses import dataclass

import torch

from fdfo.config.errors import UserError
from fdfo.config.train_options import TrainConfig
from fdfo.distributed.job import Job
from fdfo.evaluation.image_sets import ImageSet, score_images
from fdfo.evaluation.statistics import REWARD, Evaluation, prompt_means
from fdfo.model.flow_model import FlowModel
from fdfo.model.text import TextEmbeddings
from fdfo.storage.hub import load_prompt_set
from fdfo.storage.prompts import hold_out
from rewards.presets import SET_SCORERS
from rewards.scorer import Judges, Scorer, SetScorer

DEFAULT_PROMPTS, LEAST_PROMPTS = 128, 2


@dataclass(frozen=True)
class PromptSplit:
    """The prompts to train on, and those to evaluate on."""

    training: list[str]
    held_out: list[str]  # empty if nothing is evaluated


def split_prompts(config: TrainConfig) -> PromptSplit:
    """Load the prompts of a run: the held-out ones come from --eval-prompt-set, or are split off --prompt-set. Raises UserError."""
    prompts = load_prompt_set(config.prompt_set)
    if config.eval_prompt_set is not None:
        held_out = load_prompt_set(config.eval_prompt_set)
        count = min(DEFAULT_PROMPTS, len(held_out)) if config.eval_prompts is None else config.eval_prompts
        if count > len(held_out):
            raise UserError(f"{config.eval_prompt_set} has {len(held_out)} prompts: lower --eval-prompts to that or less.")
        if count == 1:
            raise UserError(f"{config.eval_prompt_set} has a single prompt: give {LEAST_PROMPTS} or more, or --eval-prompts 0.")
        taken = set(held_out[:count])
        training = [prompt for prompt in prompts if prompt not in taken]
        if not training:
            raise UserError(f"{config.eval_prompt_set} leaves no prompt to train on: give another one, or lower --eval-prompts.")
        return PromptSplit(training, held_out[:count])
    count = config.eval_prompts
    if count is None:
        tenth = len(set(prompts)) // 10
        count = min(DEFAULT_PROMPTS, tenth) if tenth >= LEAST_PROMPTS else 0
    return PromptSplit(*hold_out(prompts, count))


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts, this rank's share of them encoded, and the scorers that judge their images."""

    prompts: list[str]  # [P], of the whole job
    own: range  # this rank's. Ranks without prompts re-score prompt 0, because sharded scorers need every rank
    counted: bool  # False on a rank without prompts
    repeats: int  # images per prompt
    text: TextEmbeddings  # rows of own, on the CPU
    empty: TextEmbeddings | None  # one row
    judges: Judges
    least_diversity: float  # share of epoch 0's diversity below which an evaluation warns

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the scorers that are not trained on."""
        return tuple(self.judges.metrics)

    @property
    def scorers(self) -> dict[str, Scorer | SetScorer]:
        """The reward's scorers of single images, then the metrics."""
        return self.judges.reward.of_images | self.judges.metrics


def prepare_held_out(job: Job, config: TrainConfig, model: FlowModel, prompts: list[str], judges: Judges) -> HeldOut | None:
    """Encode this rank's held-out prompts once; return None if there are none."""
    if not prompts:
        return None
    share = job.share(len(prompts))
    own = share or range(1)
    text, empty = model.encode_prompts([prompts[i] for i in own], config.sample.guidance_scale)
    cpu = torch.device("cpu")
    repeats = 2 if any(name in SET_SCORERS for name in config.eval_metrics) else 1
    empty = None if empty is None else empty.to(cpu)
    return HeldOut(prompts, own, bool(share), repeats, text.to(cpu), empty, judges, config.eval_least_diversity)


def score_held_out(job: Job, epoch: int, held_out: HeldOut, images: torch.Tensor, finite: torch.Tensor) -> Evaluation:
    """Score the images of all ranks; each passes its own [N, 3, H, W] uint8, and which of them are finite [N]. Raises UserError.

    A prompt with an image that is not finite has the score NaN. The reward is that of the scorers of single images; with judges of
    pairs alone there is none.
    """
    counts = [held_out.repeats] * len(held_out.own)
    own_images = ImageSet([held_out.prompts[i] for i in held_out.own], counts, images)
    own = [(held_out.counted, whole) for whole in finite.view(-1, held_out.repeats).all(1).tolist()]
    # For each prompt of all ranks: does it count, and are its images finite?
    states = [state for rank in job.gather_objects(own) for state in rank]
    scores = {}
    for name, scorer in held_out.scorers.items():
        means = prompt_means(score_images(job, name, scorer, own_images))
        scores[name] = [mean if whole else math.nan for mean, (counted, whole) in zip(means, states, strict=True) if counted]
    weights = {name: held_out.judges.reward.weights[name] for name in held_out.judges.reward.of_images}
    rows = zip(*(scores[name] for name in weights), strict=True)
    reward = [sum(w * value for w, value in zip(weights.values(), row, strict=True)) for row in rows]
    return Evaluation(epoch, ({REWARD: reward} if weights else {}) | scores)
