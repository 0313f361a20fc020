"""The update: every (trajectory, step) of the job once an epoch, in shuffled optimizer steps (METHOD.md 4).

The shuffle decides, for the whole job, which samples an optimizer step takes; each rank computes the part of that step's
gradient that comes from its own trajectories, and the parts are added up. No trajectory ever leaves its rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fdfo.config import TrainConfig, UserError
from fdfo.distributed import Job
from fdfo.estimator import surrogate_loss
from fdfo.model import FlowModel
from fdfo.plan import BatchPlan
from fdfo.rollout import Differences, Rollout

RATIO_TOLERANCE = {"fp32": 1e-3, "fp16": 1e-3, "bf16": 1e-2}


@dataclass
class LossScale:
    """Factor on the loss that keeps float16 gradients above underflow; halved on overflow, doubled after calm steps."""

    enabled: bool
    value: float
    calm_steps: int = 0

    GROWTH_INTERVAL = 200
    LARGEST = 2.0**28

    @classmethod
    def start(cls, precision: str) -> "LossScale":
        """Only float16 needs one; elsewhere the scale is 1 and stays there."""
        return cls(True, cls.LARGEST) if precision == "fp16" else cls(False, 1.0)

    def overflowed(self) -> bool:
        """Lowers the scale; False where it cannot go lower, that is where the gradient itself is not finite."""
        self.calm_steps = 0
        if not self.enabled or self.value <= 1.0:
            return False
        self.value /= 2
        return True

    def succeeded(self) -> None:
        self.calm_steps += 1
        if self.enabled and self.value < self.LARGEST and self.calm_steps >= self.GROWTH_INTERVAL:
            self.value, self.calm_steps = self.value * 2, 0


@dataclass
class StepStats:
    """What one optimizer step did, over the whole job."""

    loss: float
    clipfrac: float
    ratio_mean: float
    ratio_first: float  # the sample's ratio that is farthest from 1; 1 at the first step of an epoch
    grad_norm: float
    loss_scale: float
    applied: bool


def make_optimizer(model: FlowModel, config: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.trainable(),
        lr=config.train.learning_rate,
        betas=(config.train.adam_beta1, config.train.adam_beta2),
        weight_decay=config.train.adam_weight_decay,
        eps=config.train.adam_epsilon,
    )


def step_samples(plan: BatchPlan, config: TrainConfig, epoch: int, pairs: range) -> list[tuple[torch.Tensor, int]]:
    """For every optimizer step: the rank's own samples (trajectory * T + step, local) and the global sample count.

    One permutation of all samples of the job an epoch, from (seed, epoch) alone, is cut evenly into the steps.
    """
    order = np.random.default_rng([config.seed, epoch, 0x5A]).permutation(plan.samples)
    T = config.sample.num_solver_steps
    first, last = 2 * pairs.start * T, 2 * pairs.stop * T
    steps = []
    for part in np.array_split(order, plan.gradient_steps):
        own = part[(part >= first) & (part < last)] - first
        steps.append((torch.from_numpy(own), len(part)))
    return steps


@dataclass(frozen=True)
class EpochData:
    """What all optimizer steps of an epoch share on this rank."""

    model: FlowModel
    config: TrainConfig
    plan: BatchPlan
    rollout: Rollout
    differences: Differences


def accumulate_gradient(
    data: EpochData, samples: torch.Tensor, total: int, scale: float, asked: Callable[[int], bool] = lambda done: False
) -> tuple[torch.Tensor, float]:
    """Adds the gradient of the rank's samples to the parameters, scaled, as their part of the mean over `total` samples.

    Returns sums over the samples, float64 on the CPU (loss, clipped, ratio, overflows, asked to stop), and the ratio farthest
    from 1. Ends early when a loss or a scaled gradient is not finite, or when the rank is asked to stop: asked is called before
    every micro-batch with the number of samples done. Dropped pairs count as ratio 1.
    """
    model, clip_range = data.model, data.config.train.clip_range
    sigmas = model.sigmas(data.config.sample.num_solver_steps).to(model.device)
    sums, farthest, previous = torch.zeros(5, dtype=torch.float64), [torch.ones(1, device=model.device)], None
    for start in range(0, len(samples), data.plan.train_batch):
        if asked(start):
            sums[4] = 1
            break
        loss, ratio = micro_batch_loss(data, sigmas, samples[start : start + data.plan.train_batch])
        (loss.sum() * (scale / total)).backward()
        farthest.append(ratio.gather(0, (ratio - 1).abs().argmax(0, keepdim=True)))  # indexing would wait for the GPU
        clipped = (ratio - 1).abs() > clip_range
        values = torch.stack([loss.detach().sum(), clipped.sum(), ratio.sum(), gradient_overflowed(model, scale)]).double()
        if previous is not None and not add_finite(sums, previous):
            previous = None
            break
        previous = values  # read once the next micro-batch is under way, so that the GPU never waits for the CPU
    if previous is not None:
        add_finite(sums, previous)
    ratios = torch.cat(farthest)
    return sums, float(ratios[(ratios - 1).abs().argmax()])


def micro_batch_loss(data: EpochData, sigmas: torch.Tensor, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, with a graph, and ratio of some samples: batch [N] of trajectory * T + step -> [N], [N]; the ratio of a dropped pair is 1."""
    model, config, rollout, differences = data.model, data.config, data.rollout, data.differences
    guidance, T = config.sample.guidance_scale, config.sample.num_solver_steps
    x, v_ref = rollout.samples(batch // T, batch % T)
    row, step = (batch // T).to(model.device), (batch % T).to(model.device)
    text = rollout.text.rows(row // 2)
    v = model.velocity(x, sigmas[step], text, rollout.empty, guidance)
    loss, ratio = surrogate_loss(v, v_ref, differences.dx[row], differences.dR[row], config.train.clip_range)
    kept = ~differences.dropped[row]
    if config.train.kl_weight > 0:
        with torch.no_grad(), model.base():
            v_base = model.velocity(x, sigmas[step], text, rollout.empty, guidance)
        distance = (v.float() - v_base.float()).square().mean((1, 2, 3))
        loss = loss + config.train.kl_weight * kept * distance
    return loss, torch.where(kept, ratio.detach(), torch.ones_like(ratio))


def add_finite(sums: torch.Tensor, values: torch.Tensor) -> bool:
    """Adds a micro-batch's values to the sums; False where they are not finite or the gradient overflowed."""
    values = values.cpu()
    sums[:4] += values
    return bool(values.isfinite().all() and values[3] == 0)


def gradient_overflowed(model: FlowModel, scale: float) -> torch.Tensor:
    """1 where a scaled gradient is not finite, else 0. Looked at in every micro-batch: an overflow must not cost a whole step."""
    gradients = [p.grad for p in model.trainable() if p.grad is not None]
    if scale == 1:
        return gradients[0].new_zeros(())
    return 1 - torch.stack(torch._foreach_norm(gradients)).sum().isfinite().float()


def reduce_gradient(job: Job, parameters: list[torch.nn.Parameter], scale: float) -> None:
    """Sum of the ranks' gradients, unscaled, on every rank: one all-reduce of one flat tensor."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    job.sum(flat).div_(scale)
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p)


def optimizer_step(
    job: Job,
    data: EpochData,
    samples: torch.Tensor,
    total: int,
    optimizer: torch.optim.AdamW,
    scale: LossScale,
    first: bool,
    asked: Callable[[int], bool] = lambda done: False,
) -> StepStats | None:
    """One optimizer step: gradient of the whole job, clipped, applied. A float16 overflow lowers the scale and is redone.

    None, and nothing done, when a rank was asked to stop before its part was complete.

    A loss that is not finite, or a gradient that is not finite without any scale, never reaches the weights: the step is
    left out and counted. `first`: the weights are still those that sampled, so the ratio must be 1.
    """
    config, parameters = data.config, data.model.trainable()
    while True:
        optimizer.zero_grad()
        used = scale.value
        sums, ratio = accumulate_gradient(data, samples, total, used, asked)
        reduce_gradient(job, parameters, used)
        ratio_first = farthest_ratio(job.gather_objects(ratio))
        if first:
            check_ratio(ratio_first, config.precision)
        sums = job.sum(sums.to(job.device)).cpu()
        if sums[4] > 0:
            optimizer.zero_grad()
            return None
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
        loss_finite, gradient_finite = bool(sums.isfinite().all()), bool(norm.isfinite() and sums[3] == 0)
        finite = loss_finite and gradient_finite
        if finite or not loss_finite or not scale.overflowed():
            break
    if finite:
        optimizer.step()
        scale.succeeded()
    optimizer.zero_grad()
    loss, clipped, ratio, _, _ = (sums / total).tolist()
    return StepStats(loss, clipped, ratio, ratio_first, float(norm), used, finite)


def farthest_ratio(ratios: list[float]) -> float:
    """The one farthest from 1, one that is not finite before all others."""
    return max(ratios, key=lambda ratio: abs(ratio - 1) if math.isfinite(ratio) else math.inf)


def check_ratio(ratio: float, precision: str) -> None:
    """Sampling and training must see the same velocity: at unchanged weights the ratio is 1 (METHOD.md 4)."""
    if not abs(ratio - 1) <= RATIO_TOLERANCE[precision]:
        raise UserError(
            f"The surrogate ratio at unchanged weights is {ratio:.6f} instead of 1: sampling and training disagree, so this run "
            "would learn noise; use --precision fp32 or fp16, and the same model and libraries on all processes."
        )
