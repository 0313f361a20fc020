"""One rank's share of an epoch: noise from positions, paired sampling, decoding, rewards, finite differences."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fdfo.config import TrainConfig, UserError
from fdfo.distributed import Job
from fdfo.estimator import pair_deviation
from fdfo.model import FlowModel, finite_rows
from fdfo.plan import BatchPlan, plan_churn
from fdfo.sampling import interval_gammas, prior_gammas, raw_gammas, sample_pairs
from fdfo.text import TextEmbeddings
from rewards import WeightedReward

MOST_DROPPED = 0.05  # share of pictures or pairs without a finite score or latent, above which a run cannot be trusted
START, SCHEDULE, FIRST_CHURN = 0, 1, 2  # streams of a pair's noise; solver step i uses FIRST_CHURN + i


@dataclass
class Rollout:
    """The trajectories of this rank's pairs; rows 2k and 2k + 1 are the branches of its k-th pair.

    xs and velocities lie on the GPU, or with --offload-trajectories in host memory.
    """

    prompts: list[str]  # [P], one a pair
    text: TextEmbeddings  # P rows
    empty: TextEmbeddings | None  # the empty prompt, one row, where guidance needs it
    xs: torch.Tensor  # [2P, T, C, H, W]
    velocities: torch.Tensor  # [2P, T, C, H, W]
    final: torch.Tensor  # [2P, C, H, W]

    def samples(self, row: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latent and velocity of some (trajectory, step): row, step [N] -> [N, C, H, W] each, on the device that trains."""
        row, step = row.to(self.xs.device), step.to(self.xs.device)
        return tuple(fetch(stored[row, step], self.final.device) for stored in (self.xs, self.velocities))


def trajectory_storage(config: TrainConfig, device: torch.device) -> torch.device:
    """Where trajectories are kept. In host memory they are not pinned: pinned blocks are rounded up to powers of two, and it is
    the gathered micro-batch that is copied."""
    return torch.device("cpu") if config.offload_trajectories else device


def fetch(part: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor on the device; from host memory to a GPU without waiting for the copy."""
    return part.pin_memory().to(device, non_blocking=True) if part.device.type != device.type else part


@dataclass
class Differences:
    """What a rank's rewards say about its trajectories (METHOD.md 3)."""

    dx: torch.Tensor  # [2P, C, H, W]
    dR: torch.Tensor  # [2P]
    reward: torch.Tensor  # [2P], weighted sum of the scores
    scores: dict[str, torch.Tensor]  # [2P] each
    dropped: torch.Tensor  # [2P] bool, pairs with a non-finite reward or latent


def standard_normal(shape: tuple[int, ...], seed: int, epoch: int, pair: int, stream: int) -> torch.Tensor:
    """Gaussian noise that depends on its position alone: float32 on the CPU, the same on every machine layout."""
    state = np.random.SeedSequence([seed, epoch, pair, stream]).generate_state(1, np.uint64)[0]
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(state >> np.uint64(1))))


def pair_gammas(config: TrainConfig, sigmas: torch.Tensor, epoch: int, pairs: range) -> torch.Tensor:
    """Churn of every pair at every grid point by the configured schedule: [P, T + 1]."""
    numbers = plan_churn(config.churn)
    draws = torch.stack([standard_normal((2,), config.seed, epoch, pair, SCHEDULE) for pair in pairs])  # [P, 2]
    if config.churn.schedule == "raw":
        return raw_gammas(sigmas, len(pairs), **numbers)
    if config.churn.schedule == "interval":
        return interval_gammas(sigmas, draws[:, 0], draws[:, 1], **numbers)
    return prior_gammas(sigmas, draws[:, 1], **numbers)


def encode_prompts(model: FlowModel, prompts: list[str], config: TrainConfig) -> tuple[TextEmbeddings, TextEmbeddings | None]:
    """Embeddings of the rank's prompts, and of the empty prompt where guidance needs it."""
    with model.text_encoders_loaded():
        text = model.encode(prompts)
        empty = model.encode([""]) if config.sample.guidance_scale != 1 else None
    return text, empty


@torch.no_grad()
def sample_share(
    model: FlowModel,
    config: TrainConfig,
    plan: BatchPlan,
    epoch: int,
    pairs: range,
    prompts: list[str],
    text: TextEmbeddings,
    empty: TextEmbeddings | None,
    before_batch: Callable[[int], None] = lambda done: None,
) -> Rollout:
    """Samples the rank's pairs, plan.sample_batch at a time (METHOD.md 2); tells before_batch how many pairs are done."""
    sigmas = model.sigmas(config.sample.num_solver_steps)
    shape = model.latent_shape(config.sample.resolution)
    n = 2 * len(pairs)
    # The network rounds its input to its compute type and answers in it, so these lose nothing in that type.
    storage = trajectory_storage(config, model.device)
    xs = torch.empty(n, len(sigmas) - 1, *shape, device=storage, dtype=model.compute_type)
    velocities, final = torch.empty_like(xs), torch.empty(n, *shape, device=model.device)
    for start in range(0, len(pairs), plan.sample_batch):
        before_batch(start)
        batch = pairs[start : start + plan.sample_batch]
        rows = slice(2 * start, 2 * (start + len(batch)))
        index = torch.arange(start, start + len(batch), device=model.device).repeat_interleave(2)
        batch_text = text.rows(index)

        def velocity(x: torch.Tensor, sigma: float, batch_text: TextEmbeddings = batch_text) -> torch.Tensor:
            level = torch.full((len(x),), sigma, device=x.device)
            return model.velocity(x, level, batch_text, empty, config.sample.guidance_scale)

        def noise(step: int, batch: range = batch) -> torch.Tensor:
            draws = [standard_normal((2, *shape), config.seed, epoch, pair, FIRST_CHURN + step) for pair in batch]
            return fetch(torch.cat(draws), model.device)  # [2P, C, H, W]

        x_init = torch.stack([standard_normal(shape, config.seed, epoch, pair, START) for pair in batch]).to(model.device)
        paths = sample_pairs(velocity, x_init, sigmas, pair_gammas(config, sigmas, epoch, batch), noise)
        xs[rows], velocities[rows], final[rows] = paths.xs, paths.velocities, paths.final
    return Rollout(prompts, text, empty, xs, velocities, final)


def score_share(rollout: Rollout, images: torch.Tensor, reward: WeightedReward) -> Differences:
    """Scores the images and takes the finite differences (METHOD.md 3); pairs that are not finite get dR = dx = 0.

    A dropped pair keeps its slot, with its latents replaced by 0 so that it cannot spoil a batch.
    """
    prompts = [prompt for prompt in rollout.prompts for _ in range(2)]
    scores = reward.score(prompts, images)
    total = reward.total(scores)
    whole = both_branches(finite_rows(rollout.final))
    finite = whole & both_branches(total.isfinite())
    for tensor in (rollout.xs, rollout.velocities, rollout.final):
        tensor[~whole.to(tensor.device)] = 0
    dR = torch.where(finite, pair_deviation(total), torch.zeros_like(total))
    dx = torch.where(finite[:, None, None, None], pair_deviation(rollout.final), torch.zeros_like(rollout.final))
    return Differences(dx, dR, total, scores, ~finite)


def both_branches(true: torch.Tensor) -> torch.Tensor:
    """A pair stands or falls as one: [2P] bool -> [2P] bool, true where it is true of both branches."""
    return true.view(-1, 2).all(1).repeat_interleave(2)


def check_first_scores(scores: dict[str, list[float]]) -> None:
    """Stops a run whose scorers do not work, before its first update: scores of all pictures of the job, by scorer."""
    for name, values in scores.items():
        finite = np.isfinite(values)
        if not finite.mean() >= 1 - MOST_DROPPED:
            count = int((~finite).sum())
            raise UserError(
                f"The scorer {name} gave {count} of {len(values)} pictures a score that is not finite: mend the scorer."
            )
        kept = np.asarray(values)[finite]
        if np.ptp(kept) == 0:
            raise UserError(f"The scorer {name} gave all {len(kept)} pictures the same score {kept[0]}: mend the scorer.")


def gather_scores(job: Job, scores: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Scores of all pictures of the job, in global order, on every rank."""
    parts = job.gather_objects({name: values.tolist() for name, values in scores.items()})
    return {name: [value for part in parts for value in part[name]] for name in scores}
