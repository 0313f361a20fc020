"""Flow-GRPO (Liu et al., Flow-GRPO: Training Flow Matching Models via Online RL, arXiv 2505.05470) on the tiny preset.

python benchmarks/rivals/flow_grpo.py --num-epochs 200 --seed 6 --out runs

Written from the paper's equations, without its code; sections are cited from memory. t is our sigma: 1 is noise, v = dx/dt.
- From ODE to SDE (4.2): the flow dx = v dt becomes dx = [v + s^2 / (2 t) (x + (1 - t) v)] dt + s dw, which has the same marginals,
  with the noise level s = a sqrt(t / (1 - t)). An Euler-Maruyama step of it is Gaussian: N(mean, s^2 |dt|).
- Advantage (4.1): an image's reward, less the mean of its group, over the group's standard deviation. All of its steps share it.
- Objective (4.1): the loss is minus min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), plus kl_weight times the divergence from the
  base, averaged over images and steps. ratio is the density of the drawn step under the present network over that under the one
  that drew it.
- Divergence of two such steps (4.2): |dt| / 2 (1 / s + s (1 - t) / (2 t))^2 |v - v_base|^2.
- Denoising reduction (4.3): training trajectories take fewer solver steps than the evaluations (--solver-steps).

What the paper leaves open or we do not know for certain, so that it is a choice here:
- At t = 1 the noise level is infinite. Here the first step has the level of the grid's second point.
- Whether log densities are summed over the latent's elements (the density itself, --log-ratio sum) or averaged (--log-ratio mean,
  for which the clip range must be smaller, by about the number of elements: 1,024).
- a, group, learning rate, clip range and KL weight have to suit a world of coloured shapes, so they are flags. We recall a = 0.7
  and groups of 24 from the paper. Its KL weight depends on the reward; here it is 0 unless given, as for FDFO.
- Every image has starting noise of its own.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from common import Cost, Prompted, Rival, RivalOptions, image_noise, row_batches
from loop import main
from pydantic import Field

from fdfo.config.options import NotNegative, Positive
from fdfo.distributed.launch import run_command_line
from fdfo.method.prepare import Run
from fdfo.method.rollout import FIRST_CHURN, START

DIMS = (1, 2, 3)


@dataclass(frozen=True)
class FlowGrpoOptions(RivalOptions):
    """Train the tiny preset with Flow-GRPO."""

    noise: Positive = 0.7
    """a: noise level of the sampling"""
    solver_steps: Annotated[int, Field(ge=2, le=1000)] = 8
    """solver steps of a training trajectory; evaluations take 8"""
    clip_range: Positive = 0.2
    """eps: how far the ratio may move from 1"""
    kl_weight: NotNegative = 0.0
    """weight of the divergence from the base model's steps"""
    log_ratio: Literal["sum", "mean"] = "sum"
    """how log densities are reduced over the elements of a latent"""


def noise_levels(grid: torch.Tensor, a: float) -> torch.Tensor:
    """Return the SDE's noise level at each solver step: grid [T + 1] from 1 to 0 -> [T]."""
    t = torch.cat([grid[1:2], grid[1:-1]])  # at t = 1 it would be infinite
    return a * (t / (1 - t)).sqrt()


def sde_step(x: torch.Tensor, v: torch.Tensor, t: float, t_next: float, level: float) -> tuple[torch.Tensor, float]:
    """Return mean [N, C, H, W] and standard deviation of the SDE's step from t to t_next: x, v [N, C, H, W]."""
    dt = t_next - t  # below 0
    mean = x + (v + level**2 / (2 * t) * (x + (1 - t) * v)) * dt
    return mean, level * (-dt) ** 0.5


def velocity_weights(grid: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return what a change of v moves a step's mean by, in standard deviations: grid [T + 1], levels [T] -> [T]."""
    t = grid[:-1]
    return -grid.diff().abs().sqrt() * (1 / levels + levels * (1 - t) / (2 * t))  # below 0, as t falls


def log_ratio(dv: torch.Tensor, noise: torch.Tensor, weight: torch.Tensor, reduce: str) -> torch.Tensor:
    """Return the log of a step's density at v_old + dv over that at v_old, where the step drew `noise` around the old mean.

    dv, noise [N, C, H, W]; weight [N] of velocity_weights -> [N]. log N(m + e; m') - log N(m + e; m), without large terms.
    """
    moved = weight[:, None, None, None] * dv  # of the mean, in standard deviations
    terms = moved * noise - moved.square() / 2
    return terms.sum(DIMS) if reduce == "sum" else terms.mean(DIMS)


def clipped_loss(ratio: torch.Tensor, advantage: torch.Tensor, clip_range: float) -> torch.Tensor:
    """Return minus the clipped objective of some steps: [N], [N] -> [N]."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


def group_advantages(rewards: torch.Tensor, group: int) -> torch.Tensor:
    """Return each reward's distance from its group's mean in the group's standard deviations: [N] -> [N]; 0 in a group of equals."""
    grouped = rewards.view(-1, group)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-6)).flatten()


class FlowGrpo(Rival):
    """Flow-GRPO, with the trajectories of the epoch under way. Sample i is step i % T of image i // T."""

    name = "flow_grpo"

    def __init__(self, run: Run, options: FlowGrpoOptions):
        self.run, self.options, self.steps = run, options, options.solver_steps
        self.grid = run.model.sigmas(self.steps, run.config.sample.resolution)  # [T + 1]
        self.levels = noise_levels(self.grid, options.noise)
        self.weights = velocity_weights(self.grid, self.levels).to(run.model.device)  # [T]
        self.samples = options.images * self.steps
        base = self.samples if options.kl_weight > 0 else 0
        self.cost = Cost(options.images, self.samples + base, self.samples)

    @torch.no_grad()
    def sample(self, images: Prompted) -> torch.Tensor:
        run, grid, kept, final = self.run, self.grid.tolist(), [], []
        for rows in row_batches(len(images.prompts), 2 * run.plan.sample_batch, run.model.device):
            velocity = run.model.velocity_at(images.text(rows), None, 1.0)
            x, steps = image_noise(run, images.epoch, rows, START), []
            for i, (t, t_next, level) in enumerate(zip(grid[:-1], grid[1:], self.levels.tolist(), strict=True)):
                v, noise = velocity(x, t), image_noise(run, images.epoch, rows, FIRST_CHURN + i)
                steps.append(torch.stack([x, v, noise]))  # [3, n, C, H, W]
                mean, deviation = sde_step(x, v, t, t_next, level)
                x = mean + deviation * noise
            kept.append(torch.stack(steps, dim=2).flatten(1, 2))  # [3, n T, C, H, W]
            final.append(x)
        self.images = images
        self.x, self.v_old, self.noise = torch.cat(kept, dim=1)  # [N T, C, H, W] each
        return torch.cat(final)

    def judge(self, rewards: torch.Tensor) -> None:
        self.advantage = group_advantages(rewards, self.options.group)  # [N]

    def loss(self, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model, options, row, step = self.run.model, self.options, batch // self.steps, batch % self.steps
        given = (self.x[batch], self.grid.to(model.device)[step], self.images.text(row), None, 1.0)
        v, weight = model.velocity(*given), self.weights[step]
        ratio = log_ratio(v - self.v_old[batch], self.noise[batch], weight, options.log_ratio).exp()
        loss = clipped_loss(ratio, self.advantage[row], options.clip_range)
        if options.kl_weight > 0:
            with torch.no_grad(), model.base():
                v_base = model.velocity(*given)
            divergence = -log_ratio(v - v_base, torch.zeros_like(v), weight, options.log_ratio)
            loss = loss + options.kl_weight * divergence
        return loss, {"ratio_mean": ratio, "clipfrac": (ratio - 1).abs() > options.clip_range}

    def finish(self, epochs: int) -> None:
        """Do nothing: the next epoch is drawn with the network as it is."""


if __name__ == "__main__":
    run_command_line(lambda: main(FlowGrpoOptions, FlowGrpo))
