"""Evaluation during training: held-out prompts, drawn without churn by the model in training, and scored."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fdfo.config import TrainConfig, UserError
from fdfo.distributed import Job
from fdfo.evaluation import PictureSet, score_pictures
from fdfo.hub import fetch_prompt_set
from fdfo.model import FlowModel, finite_rows, quantised
from fdfo.plan import BatchPlan
from fdfo.prompts import hold_out, load_prompts
from fdfo.results import prompt_means
from fdfo.rollout import encode_prompts
from fdfo.sampling import sample_flow
from fdfo.selection import REWARD, Evaluation
from fdfo.text import TextEmbeddings
from rewards import SET_SCORERS, Scorer, SetScorer

EVALUATION_SEED, REPEAT_SEEDS = 100_000, 1_000_000  # seed of the first picture; distance to those of the next repeat
DEFAULT_PROMPTS, LEAST_PROMPTS = 128, 2


@dataclass(frozen=True)
class PromptSplit:
    """What is trained on and what is evaluated on."""

    training: list[str]
    held_out: list[str]  # empty where nothing is evaluated


def split_prompts(config: TrainConfig) -> PromptSplit:
    """The prompts of a run: the held-out ones come from --eval-prompt-set, or are split off --prompt-set. Raises UserError."""
    prompts = load_prompts(fetch_prompt_set(config.prompt_set))
    if config.eval_prompt_set is not None:
        held_out = load_prompts(fetch_prompt_set(config.eval_prompt_set))
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
    """The held-out prompts, this rank's share of them encoded, and the scorers that judge their pictures."""

    prompts: list[str]  # [P], of the whole job
    own: range  # this rank's; a rank that got none repeats the first prompt, since ranks may share a scorer
    spare: bool  # whether it does
    repeats: int  # pictures a prompt
    text: TextEmbeddings  # rows of own, on the CPU
    empty: TextEmbeddings | None  # one row
    weights: dict[str, float]  # the training reward
    scorers: dict[str, Scorer | SetScorer]  # those of the reward, and the metrics
    metrics: tuple[str, ...]  # not trained on


def prepare_held_out(
    job: Job,
    config: TrainConfig,
    model: FlowModel,
    prompts: list[str],
    weights: dict[str, float],
    scorers: dict[str, Scorer | SetScorer],
) -> HeldOut | None:
    """Encodes this rank's held-out prompts once; None where there are none. scorers has those of weights and --eval-metrics."""
    if not prompts:
        return None
    share = job.share(len(prompts))
    own = share or range(1)
    text, empty = encode_prompts(model, [prompts[i] for i in own], config)
    cpu = torch.device("cpu")
    repeats = 2 if any(name in SET_SCORERS for name in config.eval_metrics) else 1
    wanted = {name: scorers[name] for name in (*weights, *config.eval_metrics)}
    metrics = tuple(name for name in config.eval_metrics if name not in weights)
    return HeldOut(
        prompts, own, not share, repeats, text.to(cpu), None if empty is None else empty.to(cpu), weights, wanted, metrics
    )


@torch.no_grad()
def draw_held_out(
    model: FlowModel, config: TrainConfig, plan: BatchPlan, held_out: HeldOut, before_batch: Callable[[int], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's pictures, a prompt's together: [N, 3, H, W] uint8 on the CPU, and which of them are finite: [N] bool.

    They are sampled as in training but without churn: same micro-batches, text length and compiled blocks, so that an
    evaluation costs no memory and no compiling of its own. The noise of a picture depends on its prompt's number and its
    repeat alone.
    """
    sigmas, shape = model.sigmas(config.sample.num_solver_steps), model.latent_shape(config.sample.resolution)
    positions = [(row, repeat) for row in range(len(held_out.own)) for repeat in range(held_out.repeats)]
    empty, pictures, finite = None if held_out.empty is None else held_out.empty.to(model.device), [], []
    for start in range(0, len(positions), 2 * plan.sample_batch):
        before_batch(start)
        batch = positions[start : start + 2 * plan.sample_batch]
        text = held_out.text.rows([row for row, _ in batch]).to(model.device)
        noise = torch.stack([picture_noise(shape, held_out.own[row], repeat) for row, repeat in batch]).to(model.device)

        def velocity(x: torch.Tensor, sigma: float, text: TextEmbeddings = text) -> torch.Tensor:
            level = torch.full((len(x),), sigma, device=x.device)
            return model.velocity(x, level, text, empty, config.sample.guidance_scale)

        images = model.decode(sample_flow(velocity, noise, sigmas))
        pictures.append(quantised(images))
        finite.append(finite_rows(images).cpu())
    return torch.cat(pictures), torch.cat(finite)


def picture_noise(shape: tuple[int, ...], prompt: int, repeat: int) -> torch.Tensor:
    """The starting noise of a picture: float32 on the CPU, by its prompt's number and its repeat."""
    seed = EVALUATION_SEED + REPEAT_SEEDS * repeat + prompt
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def score_held_out(job: Job, epoch: int, held_out: HeldOut, images: torch.Tensor, finite: torch.Tensor) -> Evaluation:
    """The evaluation of this rank's pictures [N, 3, H, W] uint8 and all others', on every rank. Raises UserError.

    A prompt with a picture that is not finite [N] has no score: NaN.
    """
    counts = [held_out.repeats] * len(held_out.own)
    pictures = PictureSet("", "", epoch, {}, [held_out.prompts[i] for i in held_out.own], counts, images, [])
    own = [(not held_out.spare, whole) for whole in finite.view(-1, held_out.repeats).all(1).tolist()]
    # Of each prompt of all ranks: is it the job's own, and are its pictures finite?
    states = [state for rank in job.gather_objects(own) for state in rank]
    scores = {}
    for name, scorer in held_out.scorers.items():
        means = prompt_means(score_pictures(job, name, scorer, pictures))
        scores[name] = [mean if whole else math.nan for mean, (fresh, whole) in zip(means, states, strict=True) if fresh]
    rows = zip(*(scores[name] for name in held_out.weights), strict=True)
    reward = [sum(w * value for w, value in zip(held_out.weights.values(), row, strict=True)) for row in rows]
    return Evaluation(epoch, {REWARD: reward} | scores)
