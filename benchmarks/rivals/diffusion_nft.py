"""DiffusionNFT (Zheng et al., DiffusionNFT: Online Diffusion Reinforcement with Forward Process, arXiv 2509.16117) on the tiny preset.

python benchmarks/rivals/diffusion_nft.py --num-epochs 200 --seed 6 --out runs

Written from the paper's equations, without its code; sections are cited from memory. t is our sigma: x_t = (1 - t) x0 + t noise, and
the velocity v that leads there is noise - x0.
- Images are drawn by the old policy with the plain solver. Their rewards R become probabilities (3.3):
  r = 1/2 + 1/2 clip((R - mean of the group) / Z, -1, 1).
- Each clean image is noised again, and the network is trained on the forward process alone (theorem 3.2):
  loss = r |v+ - v|^2 + (1 - r) |v- - v|^2, with the implicit positive policy v+ = (1 - beta) v_old + beta v_theta and the implicit
  negative one v- = (1 + beta) v_old - beta v_theta. The optimum is v_old + 2 / beta Delta, where Delta (theorem 3.1) points from the
  old policy to the rewarded part of it.
- Self-normalised weighting (3.3): |v+ - v|^2 is taken as |x0+ - x0|^2 / stopgrad(mean |x0+ - x0|), x0+ = x_t - t v+; v- likewise.
- The old policy follows by a soft update after each epoch (3.3): theta_old <- eta theta_old + (1 - eta) theta.

What the paper leaves open or we do not know for certain, so that it is a flag:
- Z: the standard deviation of all rewards of an epoch, or of the group (--scale).
- eta: we recall that it rises with the number of updates i, as min(0.001 i, 0.5) (--old-rise, --old-most).
- At how many noise levels an image is trained on, and which: the solver's or any (--noise-levels, --levels).
- beta, group and learning rate have to suit a world of coloured shapes. There is no KL term here.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from common import Cost, Prompted, Rival, RivalOptions, image_noise, move_average, row_batches
from loop import main
from pydantic import Field

from fdfo.config.options import Count, NotNegative, Positive
from fdfo.distributed.launch import run_command_line
from fdfo.method.prepare import Run
from fdfo.method.rollout import FIRST_CHURN, START, SUBSET
from fdfo.method.sampling import noised, sample_flow

DIMS = (1, 2, 3)


@dataclass(frozen=True)
class NftOptions(RivalOptions):
    """Train the tiny preset with DiffusionNFT."""

    beta: Positive = 1.0
    """how far the implicit policies lie from the old one"""
    noise_levels: Count = 8
    """noise levels at which each image is trained on"""
    levels: Literal["grid", "uniform"] = "grid"
    """where they lie: on the solver's grid, or anywhere from 0 to 1; in both cases one in each of as many equal parts"""
    weighting: Literal["self", "none"] = "self"
    """self: squared errors of x0 over their mean size, as in the paper; none: squared errors of the velocity"""
    scale: Literal["all", "group"] = "all"
    """Z: the standard deviation of all rewards of the epoch, or of the group"""
    old_rise: NotNegative = 0.001
    """eta after an epoch is this times the number of epochs done"""
    old_most: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """largest eta"""


def optimality(rewards: torch.Tensor, group: int, scale: str) -> torch.Tensor:
    """Return rewards as probabilities r in [0, 1], 1/2 at the group's mean: [N] -> [N]."""
    grouped = rewards.view(-1, group)
    spread = grouped.std() if scale == "all" else grouped.std(1, keepdim=True)
    return (0.5 + 0.5 * ((grouped - grouped.mean(1, keepdim=True)) / (spread + 1e-6)).clamp(-1, 1)).flatten()


def squared_error(v: torch.Tensor, target: torch.Tensor, t: torch.Tensor, weighting: str) -> torch.Tensor:
    """Return the error of a velocity: v, target [N, C, H, W], t [N] -> [N]. With x0 = x_t - t v, the error of x0 is t that of v."""
    if weighting == "none":
        return (v - target).square().mean(DIMS)
    error = t[:, None, None, None] * (v - target)
    return error.square().mean(DIMS) / error.detach().abs().mean(DIMS).clamp(min=1e-5)


def implicit_policies(v: torch.Tensor, v_old: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the velocities of the positive and of the negative policy: v, v_old [N, C, H, W] -> [N, C, H, W] each."""
    return v_old + beta * (v - v_old), v_old - beta * (v - v_old)


def nft_loss(
    policies: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor, t: torch.Tensor, r: torch.Tensor, weighting: str
) -> torch.Tensor:
    """Return the loss of both implicit policies: policies, target [N, C, H, W], t, r [N] -> [N]."""
    positive, negative = (squared_error(v, target, t, weighting) for v in policies)
    return r * positive + (1 - r) * negative


class DiffusionNft(Rival):
    """DiffusionNFT, with the noised images of the epoch under way. Sample i is noise level i % K of image i // K."""

    name = "diffusion_nft"

    def __init__(self, run: Run, options: NftOptions):
        self.run, self.options = run, options
        self.old = [parameter.detach().clone() for parameter in run.model.trainable()]  # the LoRA that draws
        self.solver_steps = run.config.sample.num_solver_steps
        self.grid = run.model.sigmas(self.solver_steps, run.config.sample.resolution)  # [T + 1]
        self.samples = options.images * options.noise_levels
        forwards = options.images * self.solver_steps + self.samples  # to draw, and v_old
        self.cost = Cost(options.images, forwards, self.samples)

    @torch.no_grad()
    def sample(self, images: Prompted) -> torch.Tensor:
        run, final = self.run, []
        self.images, kept = images, []
        with run.model.adapter_of(self.old):
            for rows in row_batches(len(images.prompts), 2 * run.plan.sample_batch, run.model.device):
                velocity = run.model.velocity_at(images.text(rows), None, 1.0)
                final.append(sample_flow(velocity, image_noise(run, images.epoch, rows, START), self.grid))
                kept.append(self.noised(rows, final[-1]))
        self.t, self.x, self.target, self.v_old = (torch.cat(parts) for parts in zip(*kept, strict=True))
        return torch.cat(final)

    def noised(self, rows: torch.Tensor, x0: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Noise images, and return t [n K], x_t, the velocity that leads there and the old policy's: [n K, C, H, W] each."""
        K, model, epoch = self.options.noise_levels, self.run.model, self.images.epoch
        t = torch.stack([self.draw_levels(epoch, row) for row in rows.tolist()]).flatten().to(model.device)
        noise = torch.stack([image_noise(self.run, epoch, rows, FIRST_CHURN + k) for k in range(K)], dim=1).flatten(0, 1)
        x0 = x0.repeat_interleave(K, dim=0)
        x, text = noised(x0, t, noise), self.images.text(rows.repeat_interleave(K))
        parts = torch.arange(len(t), device=t.device).split(self.run.config.max_batch_size)
        v_old = torch.cat([model.velocity(x[part], t[part], text.rows(part), None, 1.0) for part in parts])
        return t, x, noise - x0, v_old

    def draw_levels(self, epoch: int, row: int) -> torch.Tensor:
        """Return the noise levels of an image, one from each equal part of those there are: [K]."""
        K = self.options.noise_levels
        place = (np.arange(K) + np.random.default_rng([self.run.config.seed, epoch, row, SUBSET]).random(K)) / K  # in [0, 1)
        if self.options.levels == "uniform":
            return torch.from_numpy(place).float()
        return self.grid[torch.from_numpy((place * self.solver_steps).astype(int))]

    def judge(self, rewards: torch.Tensor) -> None:
        self.r = optimality(rewards, self.options.group, self.options.scale)  # [N]

    def loss(self, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        row, t, v_old, options = batch // self.options.noise_levels, self.t[batch], self.v_old[batch], self.options
        v = self.run.model.velocity(self.x[batch], t, self.images.text(row), None, 1.0)
        policies = implicit_policies(v, v_old, options.beta)
        loss = nft_loss(policies, self.target[batch], t, self.r[row], options.weighting)
        return loss, {"distance_to_old": (v.detach() - v_old).square().mean(DIMS)}

    def finish(self, epochs: int) -> None:
        """Move the old policy towards the network."""
        move_average(self.old, self.run.model.trainable(), min(self.options.old_rise * epochs, self.options.old_most))


if __name__ == "__main__":
    run_command_line(lambda: main(NftOptions, DiffusionNft))
