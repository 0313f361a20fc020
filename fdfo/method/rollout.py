"""One rank's share of an epoch: draws from positions, paired sampling, rewards, finite differences (docs/method.md 2 to 4)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fdfo.config.plan import BatchPlan, plan_churn, plan_subset
from fdfo.config.train_options import TrainConfig
from fdfo.method.estimator import choose_samples, pair_deviation
from fdfo.method.sampling import churn_weights, interval_gammas, noised, prior_gammas, raw_gammas, sample_pairs
from fdfo.model.acceleration import fetch
from fdfo.model.flow_model import FlowModel
from fdfo.model.images import finite_rows
from fdfo.model.memory import trajectory_storage
from fdfo.model.text import TextEmbeddings
from rewards.scorer import WeightedReward

START, SCHEDULE, FIRST_CHURN = 0, 1, 2  # streams of a pair's draws; solver step i uses FIRST_CHURN + i
NOISED_ANEW = 2**30  # above all of them; image b of a pair at solver step i uses NOISED_ANEW + 2 i + b
SUBSET = 2**31


@dataclass(frozen=True)
class PairShare:
    """This rank's pairs of an epoch, and their encoded prompts."""

    epoch: int
    pairs: range  # global indices
    prompts: list[str]  # [P], one per pair
    text: TextEmbeddings  # P rows
    empty: TextEmbeddings | None  # the empty prompt, one row, if guidance needs it


@dataclass(frozen=True)
class Samples:
    """The S (trajectory, step) samples of this rank's pairs to train on, pair after pair: by branch, then by step. On the CPU.

    If all are trained on, sample i is step i % T of trajectory i // T.
    """

    trajectory: torch.Tensor  # [S] int64, counted on this rank
    step: torch.Tensor  # [S] int64
    weight: torch.Tensor  # [S] float32, mean 1 over a pair; all 1 if all steps are trained on


@dataclass
class Rollout:
    """The trajectories of this rank's pairs; of trajectories, 2k and 2k + 1 are the branches of its k-th pair.

    xs and velocities lie on the GPU, or with --offload-trajectories in host memory.
    """

    share: PairShare
    samples: Samples
    xs: torch.Tensor  # [S, C, H, W], of the samples
    velocities: torch.Tensor  # [S, C, H, W], of the samples
    final: torch.Tensor  # [2P, C, H, W]

    def places(self, batch: range) -> slice:
        """Return where the samples of some pairs lie. batch: numbers of the pairs on this rank."""
        each = len(self.samples.step) // len(self.share.pairs)
        return slice(each * batch.start, each * batch.stop)

    def latents(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latent and velocity of some of the samples: batch [N] -> [N, C, H, W] each, on the training device."""
        batch = batch.to(self.xs.device)
        return tuple(fetch(stored[batch], self.final.device) for stored in (self.xs, self.velocities))


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
    if config.churn.schedule == "raw":
        return raw_gammas(sigmas, len(pairs), **numbers)
    draws = torch.stack([standard_normal((2,), config.seed, epoch, pair, SCHEDULE) for pair in pairs])  # [P, 2]
    weights = churn_weights(draws[:, 1], numbers["weight"], numbers["weight_sd"])
    if config.churn.schedule == "prior":
        return prior_gammas(sigmas, weights)
    centres = numbers["mu"] + numbers["sd"] * draws[:, 0].double()
    return interval_gammas(sigmas, centres, weights, numbers["soft_sd"])


def pair_samples(config: TrainConfig, epoch: int, pairs: range) -> Samples:
    """Draw the samples of some pairs to train on, each pair's from its position alone (docs/method.md 4)."""
    subset, T = plan_subset(config), config.sample.num_solver_steps
    streams = (np.random.default_rng([config.seed, epoch, pair, SUBSET]) for pair in pairs)
    draws = torch.from_numpy(np.stack([stream.random((2, subset.steps)) for stream in streams]))  # [P, 2, K]
    branch, step, weight = choose_samples(draws, T, subset.branches == 2)  # [P, B, K] each
    trajectory = 2 * torch.arange(len(pairs))[:, None, None] + branch
    return Samples(trajectory.flatten(), step.flatten(), weight.flatten().float())


@torch.no_grad()
def sample_share(
    model: FlowModel,
    config: TrainConfig,
    plan: BatchPlan,
    share: PairShare,
    before_batch: Callable[[int], None] = lambda done: None,
    after_batch: Callable[[Rollout, range], None] = lambda rollout, batch: None,
) -> Rollout:
    """Sample the rank's pairs, plan.sample_batch at a time (docs/method.md 2), and keep the samples to train on.

    before_batch gets the number of pairs done, after_batch the rollout so far and the batch's pairs by their numbers on this rank.
    """
    shape, pairs = model.latent_shape(config.sample.resolution), share.pairs
    samples = pair_samples(config, share.epoch, pairs)
    # The network rounds its input to its compute type and answers in it, so storing that type loses nothing.
    storage = trajectory_storage(config, model.device)
    xs = torch.empty(len(samples.step), *shape, device=storage, dtype=model.compute_type)  # [S, C, H, W]
    rollout = Rollout(share, samples, xs, torch.empty_like(xs), torch.empty(2 * len(pairs), *shape, device=model.device))
    with model.together():
        for start in range(0, len(pairs), plan.sample_batch):
            before_batch(start)
            batch = range(start, min(start + plan.sample_batch, len(pairs)))
            sample_batch(model, config, rollout, batch)
            after_batch(rollout, batch)
    return rollout


def sample_batch(model: FlowModel, config: TrainConfig, rollout: Rollout, batch: range) -> None:
    """Sample some of the rank's pairs, by their numbers on this rank, into the rollout."""
    share, seed, epoch = rollout.share, config.seed, rollout.share.epoch
    pairs = share.pairs[batch.start : batch.stop]
    sigmas = model.sigmas(config.sample.num_solver_steps, config.sample.resolution)
    shape, rows = rollout.final.shape[1:], slice(2 * batch.start, 2 * batch.stop)
    index = torch.arange(batch.start, batch.stop, device=model.device).repeat_interleave(2)
    kept = None if config.train.forward_process else KeptSamples(rollout, batch)

    def noise(step: int) -> torch.Tensor:
        draws = [standard_normal((2, *shape), seed, epoch, pair, FIRST_CHURN + step) for pair in pairs]
        return fetch(torch.cat(draws), model.device)  # [2P, C, H, W]

    velocity = model.velocity_at(share.text.rows(index), share.empty, config.sample.guidance_scale)
    x_init = torch.stack([standard_normal(shape, seed, epoch, pair, START) for pair in pairs]).to(model.device)
    gammas = pair_gammas(config, sigmas, epoch, pairs)
    keep = (lambda step, x, v: None) if kept is None else kept.keep
    rollout.final[rows] = sample_pairs(velocity, x_init, sigmas, gammas, noise, keep)
    if kept is None:
        noise_anew(model, config, rollout, batch)
    else:
        kept.store()


def noise_anew(model: FlowModel, config: TrainConfig, rollout: Rollout, batch: range) -> None:
    """Put the batch's final latents into the rollout, noised to the levels of its samples, with the network's v (docs/method.md 4)."""
    share, samples, shape = rollout.share, rollout.samples, rollout.final.shape[1:]
    sigmas, own = model.sigmas(config.sample.num_solver_steps, config.sample.resolution), rollout.places(batch)

    def noise(row: int, step: int) -> torch.Tensor:
        stream = NOISED_ANEW + 2 * step + row % 2
        return standard_normal(shape, config.seed, share.epoch, share.pairs[row // 2], stream)  # [C, H, W]

    for part in torch.arange(own.start, own.stop).split(2 * len(batch)):
        row, step = samples.trajectory[part], samples.step[part]  # [n]
        draws = fetch(torch.stack(list(map(noise, row.tolist(), step.tolist()))), model.device)  # [n, C, H, W]
        row, sigma = row.to(model.device), sigmas[step].to(model.device)
        x = noised(rollout.final[row], sigma, draws).to(rollout.xs.dtype)
        v = model.velocity(x, sigma, share.text.rows(row // 2), share.empty, config.sample.guidance_scale)
        rollout.final[row[~finite_rows(v)]] = torch.nan  # drops the pair, as an overflow on the way to the image does
        for kept, values in ((rollout.xs, x), (rollout.velocities, v)):
            kept[part.to(kept.device)] = values.to(kept)


class KeptSamples:
    """Collects latents and velocities of a batch's samples while it is sampled, on the model's device, then puts them into the rollout."""

    def __init__(self, rollout: Rollout, batch: range):
        """batch: numbers of pairs on this rank."""
        self.rollout, self.own, samples = rollout, rollout.places(batch), rollout.samples
        step, self.order = samples.step[self.own].sort(stable=True)
        rows = samples.trajectory[self.own][self.order] - 2 * batch.start
        counts = step.bincount(minlength=int(step.max()) + 1).tolist()
        self.rows = dict(enumerate(fetch(rows, rollout.final.device).split(counts)))  # by step, in the batch
        self.kept: list[torch.Tensor] = []

    def keep(self, step: int, x: torch.Tensor, v: torch.Tensor) -> None:
        """Keep the samples of one solver step: x, v [2P, C, H, W] of the batch."""
        rows = self.rows.get(step)
        if rows is not None and len(rows):
            self.kept.append(torch.stack([x[rows], v[rows]]).to(self.rollout.xs.dtype))  # [2, n, C, H, W]

    def store(self) -> None:
        xs, velocities = torch.cat(self.kept, dim=1).to(self.rollout.xs.device)
        order = self.order.to(xs.device)
        self.rollout.xs[self.own][order], self.rollout.velocities[self.own][order] = xs, velocities


def score_share(rollout: Rollout, images: torch.Tensor, reward: WeightedReward) -> Differences:
    """Score the images and take the finite differences (docs/method.md 3); pairs that are not finite get dR = dx = 0.

    A dropped pair keeps its slot; its latents become 0 so that it cannot spoil a batch.
    """
    prompts = [prompt for prompt in rollout.share.prompts for _ in range(2)]
    scores = reward.score(prompts, images)
    total = reward.total(scores)
    intact = whole_pairs(finite_rows(rollout.final))
    finite = intact & whole_pairs(total.isfinite())
    rollout.final[~intact] = 0
    broken = ~intact.cpu()[rollout.samples.trajectory]  # [S]
    for tensor in (rollout.xs, rollout.velocities):
        tensor[broken.to(tensor.device)] = 0
    dR = torch.where(finite, pair_deviation(total), torch.zeros_like(total))
    dx = torch.where(finite[:, None, None, None], pair_deviation(rollout.final), torch.zeros_like(rollout.final))
    return Differences(dx, dR, total, scores, ~finite)


def weigh_again(differences: Differences, weights: dict[str, float]) -> None:
    """Take the differences of the rewards again, with other weights of the scorers. The reward itself stays in the scorers' units."""
    total = sum(weight * pair_deviation(differences.scores[name]) for name, weight in weights.items())
    differences.dR = torch.where(differences.dropped, torch.zeros_like(total), total)


def whole_pairs(branches: torch.Tensor) -> torch.Tensor:
    """Return, for each branch, whether both branches of its pair are True: [2P] bool -> [2P] bool."""
    return branches.view(-1, 2).all(1).repeat_interleave(2)
