"""The update: every (trajectory, step) of the job, or a subset, once per epoch, in shuffled optimizer steps (docs/method.md 4).

The shuffle decides, for the whole job, which samples an optimizer step takes. Each rank computes the part of that step's gradient
that comes from its own trajectories, and the parts are added up. No trajectory ever leaves its rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fdfo.config.plan import BatchPlan
from fdfo.config.train_options import TrainConfig
from fdfo.distributed.job import Job
from fdfo.evaluation.health import StepStats
from fdfo.method.estimator import own_direction, surrogate_loss
from fdfo.method.learner import Learner
from fdfo.method.rollout import Differences, Rollout
from fdfo.model.flow_model import FlowModel


@dataclass(frozen=True)
class StepSamples:
    """The samples of one optimizer step."""

    own: torch.Tensor  # [N], this rank's: their places in its rollout
    total: int  # of the whole job


@dataclass(frozen=True)
class EpochData:
    """What all optimizer steps of an epoch share on this rank."""

    model: FlowModel
    config: TrainConfig
    plan: BatchPlan
    rollout: Rollout
    differences: Differences


def step_samples(plan: BatchPlan, config: TrainConfig, epoch: int, pairs: range) -> list[StepSamples]:
    """Return the samples of every optimizer step of an epoch, dealt over the whole job. pairs: this rank's."""
    first, last = (plan.subset.pair_samples * pair for pair in (pairs.start, pairs.stop))
    steps = []
    for part in deal_samples(plan, config.seed, epoch):
        own = part[(part >= first) & (part < last)] - first
        steps.append(StepSamples(torch.from_numpy(own), len(part)))
    return steps


def deal_samples(plan: BatchPlan, seed: int, epoch: int) -> list[np.ndarray]:
    """Deal the job's samples, numbered pair after pair, to the optimizer steps, from (seed, epoch) alone (docs/method.md 4).

    All samples are cut evenly by one permutation. A subset is laid out part by part of the grid, within a part pair by pair; of
    as many neighbours as there are optimizer steps, each step gets one.
    """
    G, subset = plan.gradient_steps, plan.subset
    if subset.whole:
        return np.array_split(np.random.default_rng([seed, epoch, 0x5A]).permutation(plan.samples), G)
    numbers = np.arange(plan.samples).reshape(-1, subset.branches, subset.steps).transpose(2, 0, 1).flatten()
    neighbours = np.tile(np.arange(G), (-(-plan.samples // G), 1))
    step = np.random.default_rng([seed, epoch, 0x5B]).permuted(neighbours, axis=1).flatten()[: plan.samples]
    return [numbers[step == number] for number in range(G)]


def optimizer_step(
    job: Job, learner: Learner, data: EpochData, samples: StepSamples, asked: Callable[[int], bool] = lambda done: False
) -> StepStats | None:
    """Take one optimizer step: sum the job's gradient, clip it, apply it. A float16 overflow lowers the scale and repeats the step.

    Returns None, and changes nothing, if asked(samples done) says on some rank that it was asked to stop. A loss that is not
    finite, or a gradient that is not finite without any scale, never reaches the weights: the step is skipped and counted.
    """
    config, parameters, optimizer = data.config, data.model.trainable(), learner.optimizer
    while True:
        optimizer.zero_grad()
        scale = learner.scale.value
        with data.model.together():
            sums, ratio = accumulate_gradient(data, samples, scale, asked)
        reduce_gradient(job, parameters, scale)
        ratio_first = farthest_ratio(job.gather_objects(ratio))
        sums = job.sum(sums.to(job.device)).cpu()
        if sums[4] > 0:
            optimizer.zero_grad()
            return None
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
        loss_finite, gradient_finite = bool(sums.isfinite().all()), bool(norm.isfinite() and sums[3] == 0)
        finite = loss_finite and gradient_finite
        if finite or not loss_finite or not learner.scale.overflowed():
            break
    if finite:
        optimizer.step()
        learner.scale.succeeded()
    optimizer.zero_grad()
    loss, clipped, ratio, _, _ = (sums / samples.total).tolist()
    return StepStats(loss, clipped, ratio, ratio_first, float(norm), scale, finite)


def accumulate_gradient(
    data: EpochData, samples: StepSamples, scale: float, asked: Callable[[int], bool]
) -> tuple[torch.Tensor, float]:
    """Add the gradient of the rank's samples to the parameters, scaled, as their part of the mean over the step's samples.

    Returns sums over the samples, float64 on the CPU (loss, clipped, ratio, overflows, asked to stop), and the ratio farthest
    from 1. Ends early if a loss or a scaled gradient is not finite, or if asked, which is called before every micro-batch with
    the number of samples done, returns True. Dropped pairs count as ratio 1.
    """
    model, sample, clip_range = data.model, data.config.sample, data.config.train.clip_range
    sigmas = model.sigmas(sample.num_solver_steps, sample.resolution).to(model.device)
    sums, farthest, previous = torch.zeros(5, dtype=torch.float64), [torch.ones(1, device=model.device)], None
    for start in range(0, len(samples.own), data.plan.train_batch):
        if asked(start):
            sums[4] = 1
            break
        loss, ratio = micro_batch_loss(data, sigmas, samples.own[start : start + data.plan.train_batch])
        (loss.sum() * (scale / samples.total)).backward()
        farthest.append(ratio.gather(0, (ratio - 1).abs().argmax(0, keepdim=True)))  # indexing would wait for the GPU
        clipped = (ratio - 1).abs() > clip_range
        values = torch.stack([loss.detach().sum(), clipped.sum(), ratio.sum(), gradient_overflowed(model, scale)]).double()
        if previous is not None and not add_finite(sums, previous):
            previous = None
            break
        previous = values  # read while the next micro-batch runs, so that the GPU never waits for the CPU
    if previous is not None:
        add_finite(sums, previous)
    ratios = torch.cat(farthest)
    return sums, float(ratios[(ratios - 1).abs().argmax()])


def micro_batch_loss(data: EpochData, sigmas: torch.Tensor, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute weighted loss, with a graph, and ratio of some samples: batch [N], their places in the rollout -> [N], [N].

    The ratio of a dropped pair is 1.
    """
    model, config, rollout, differences = data.model, data.config, data.rollout, data.differences
    samples = rollout.samples
    x, v_ref = rollout.latents(batch)  # [N, C, H, W]
    row, step, weight = (of[batch].to(model.device) for of in (samples.trajectory, samples.step, samples.weight))
    given = (rollout.share.text.rows(row // 2), rollout.share.empty, config.sample.guidance_scale)
    if config.train.kl_weight > 0:  # first, so that the backward of v follows its forward
        with torch.no_grad(), model.base():
            v_base = model.velocity(x, sigmas[step], *given)
    v = model.velocity(x, sigmas[step], *given)
    if config.train.forward_process:
        direction, share = own_direction(x, v_ref, sigmas[step], rollout.final[row]), sigmas[step]
    else:
        direction, share = differences.dx[row], 1
    surrogate, ratio = surrogate_loss(v, v_ref, direction, differences.dR[row], config.train.clip_range)
    loss = share * surrogate
    kept = ~differences.dropped[row]
    if config.train.proximal_weight > 0:
        loss = loss + config.train.proximal_weight * differences.dR[row].abs() * squared_distance(v, v_ref)
    if config.train.kl_weight > 0:
        loss = loss + config.train.kl_weight * kept * squared_distance(v, v_base)
    return weight * loss, torch.where(kept, ratio.detach(), torch.ones_like(ratio))


def squared_distance(v: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the mean square of the difference of two velocities, in float32: [N, C, H, W] each -> [N]."""
    return (v.float() - other.float()).square().mean((1, 2, 3))


def add_finite(sums: torch.Tensor, values: torch.Tensor) -> bool:
    """Add a micro-batch's values to the sums; return False if they are not finite or the gradient overflowed."""
    values = values.cpu()
    sums[:4] += values
    return bool(values.isfinite().all() and values[3] == 0)


def gradient_overflowed(model: FlowModel, scale: float) -> torch.Tensor:
    """Return 1 if a scaled gradient is not finite, else 0. Checked per micro-batch, so that an overflow does not cost a whole step."""
    gradients = [p.grad for p in model.trainable() if p.grad is not None]
    if scale == 1:
        return gradients[0].new_zeros(())
    return 1 - torch.stack(torch._foreach_norm(gradients)).sum().isfinite().float()


def reduce_gradient(job: Job, parameters: list[torch.nn.Parameter], scale: float) -> None:
    """Sum the ranks' gradients, unscaled, on every rank: one all-reduce of one flat tensor."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    job.sum(flat).div_(scale)
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p)


def farthest_ratio(ratios: list[float]) -> float:
    """Return the ratio farthest from 1; one that is not finite comes before all others."""
    return max(ratios, key=lambda ratio: abs(ratio - 1) if math.isfinite(ratio) else math.inf)
