"""One rank's share of an epoch: noise from positions, paired sampling, rewards, finite differences (docs/method.md 2 and 3)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fdfo.config.plan import BatchPlan, plan_churn
from fdfo.config.train_options import TrainConfig
from fdfo.method.estimator import pair_deviation
from fdfo.method.sampling import interval_gammas, prior_gammas, raw_gammas, sample_pairs
from fdfo.model.acceleration import fetch
from fdfo.model.flow_model import FlowModel
from fdfo.model.images import finite_rows
from fdfo.model.memory import trajectory_storage
from fdfo.model.text import TextEmbeddings
from rewards.scorer import WeightedReward

START, SCHEDULE, FIRST_CHURN = 0, 1, 2  # streams of a pair's noise; solver step i uses FIRST_CHURN + i


@dataclass(frozen=True)
class PairShare:
    """This rank's pairs of an epoch, and their encoded prompts."""

    epoch: int
    pairs: range  # global indices
    prompts: list[str]  # [P], one per pair
    text: TextEmbeddings  # P rows
    empty: TextEmbeddings | None  # the empty prompt, one row, if guidance needs it


@dataclass
class Rollout:
    """The trajectories of this rank's pairs; rows 2k and 2k + 1 are the branches of its k-th pair.

    xs and velocities lie on the GPU, or with --offload-trajectories in host memory.
    """

    share: PairShare
    xs: torch.Tensor  # [2P, T, C, H, W]
    velocities: torch.Tensor  # [2P, T, C, H, W]
    final: torch.Tensor  # [2P, C, H, W]

    def samples(self, row: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latent and velocity of some (trajectory, step): row, step [N] -> [N, C, H, W] each, on the training device."""
        row, step = row.to(self.xs.device), step.to(self.xs.device)
        return tuple(fetch(stored[row, step], self.final.device) for stored in (self.xs, self.velocities))


@dataclass
class Differences:
    """What a rank's rewards say about its trajectories (docs/method.md 3)."""

    dx: torch.Tensor  # [2P, C, H, W]
    dR: torch.Tensor  # [2P]
    reward: torch.Tensor  # [2P], weighted sum of the scores
    scores: dict[str, torch.Tensor]  # [2P] each
    dropped: torch.Tensor  # [2P] bool, pairs with a non-finite reward or latent


def standard_normal(shape: tuple[int, ...], seed: int, epoch: int, pair: int, stream: int) -> torch.Tensor:
    """Draw Gaussian noise that depends on its position alone: float32 on the CPU, whatever the machine."""
    state = np.random.SeedSequence([seed, epoch, pair, stream]).generate_state(1, np.uint64)[0]
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(state >> np.uint64(1))))


def pair_gammas(config: TrainConfig, sigmas: torch.Tensor, epoch: int, pairs: range) -> torch.Tensor:
    """Return the churn of every pair at every grid point by the configured schedule: [P, T + 1]."""
    numbers = plan_churn(config.churn)
    draws = torch.stack([standard_normal((2,), config.seed, epoch, pair, SCHEDULE) for pair in pairs])  # [P, 2]
    if config.churn.schedule == "raw":
        return raw_gammas(sigmas, len(pairs), **numbers)
    if config.churn.schedule == "interval":
        return interval_gammas(sigmas, draws[:, 0], draws[:, 1], **numbers)
    return prior_gammas(sigmas, draws[:, 1], **numbers)


@torch.no_grad()
def sample_share(
    model: FlowModel,
    config: TrainConfig,
    plan: BatchPlan,
    share: PairShare,
    before_batch: Callable[[int], None] = lambda done: None,
) -> Rollout:
    """Sample the rank's pairs, plan.sample_batch at a time (docs/method.md 2); before_batch gets the number of pairs done."""
    sigmas = model.sigmas(config.sample.num_solver_steps)
    shape = model.latent_shape(config.sample.resolution)
    n, seed, epoch = 2 * len(share.pairs), config.seed, share.epoch
    # The network rounds its input to its compute type and answers in it, so storing that type loses nothing.
    storage = trajectory_storage(config, model.device)
    xs = torch.empty(n, len(sigmas) - 1, *shape, device=storage, dtype=model.compute_type)  # [2P, T, C, H, W]
    velocities, final = torch.empty_like(xs), torch.empty(n, *shape, device=model.device)
    for start in range(0, len(share.pairs), plan.sample_batch):
        before_batch(start)
        batch = share.pairs[start : start + plan.sample_batch]
        rows = slice(2 * start, 2 * (start + len(batch)))
        index = torch.arange(start, start + len(batch), device=model.device).repeat_interleave(2)

        def noise(step: int, batch: range = batch) -> torch.Tensor:
            draws = [standard_normal((2, *shape), seed, epoch, pair, FIRST_CHURN + step) for pair in batch]
            return fetch(torch.cat(draws), model.device)  # [2P, C, H, W]

        velocity = model.velocity_at(share.text.rows(index), share.empty, config.sample.guidance_scale)
        x_init = torch.stack([standard_normal(shape, seed, epoch, pair, START) for pair in batch]).to(model.device)
        paths = sample_pairs(velocity, x_init, sigmas, pair_gammas(config, sigmas, epoch, batch), noise)
        xs[rows], velocities[rows], final[rows] = paths.xs, paths.velocities, paths.final
    return Rollout(share, xs, velocities, final)


def score_share(rollout: Rollout, images: torch.Tensor, reward: WeightedReward) -> Differences:
    """Score the images and take the finite differences (docs/method.md 3); pairs that are not finite get dR = dx = 0.

    A dropped pair keeps its slot; its latents become 0 so that it cannot spoil a batch.
    """
    prompts = [prompt for prompt in rollout.share.prompts for _ in range(2)]
    scores = reward.score(prompts, images)
    total = reward.total(scores)
    intact = whole_pairs(finite_rows(rollout.final))
    finite = intact & whole_pairs(total.isfinite())
    for tensor in (rollout.xs, rollout.velocities, rollout.final):
        tensor[~intact.to(tensor.device)] = 0
    dR = torch.where(finite, pair_deviation(total), torch.zeros_like(total))
    dx = torch.where(finite[:, None, None, None], pair_deviation(rollout.final), torch.zeros_like(rollout.final))
    return Differences(dx, dR, total, scores, ~finite)


def whole_pairs(branches: torch.Tensor) -> torch.Tensor:
    """Return, for each branch, whether both branches of its pair are True: [2P] bool -> [2P] bool."""
    return branches.view(-1, 2).all(1).repeat_interleave(2)
