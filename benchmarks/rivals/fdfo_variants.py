"""FDFO on the rivals' harness, with changes to it as flags, each off by default: can the gap to DiffusionNFT be closed?

python benchmarks/rivals/fdfo_variants.py --num-epochs 200 --seed 6 --out runs --group 8 --clip-range 0.5

Without flags it is `train.py --preset tiny-published`: same draws, same order of samples, same loss. Formulas are cited as in
docs/method.md.
- A group are K branches of one starting noise; K = 2 is FDFO's pair (2). A prompt has M starts.
- dx and dR (3) are deviations from the mean of a start's K branches; of its branches with the highest and the lowest reward, which
  alone are trained on; or of all K M images of the prompt, across its starts (--baseline).
- --residual W adds W times the same loss with a d that points from the image that v_ref expects of a latent to the image that came,
  at size 1, and with the deviation of the reward from the mean of the prompt's K M images. That is the direction of DiffusionNFT,
  which takes it at --states fresh. --twin 0 leaves nothing else.
- With --states fresh the final latents are noised anew, to each noise level of the grid, and trained on there.
- The trust region lets v move by about clip_range / 2 times the size of dx, so --clip-range and --churn belong together.
- With --ema the images are drawn, and v_ref (4) is taken, with an average of the adapter over the epochs:
  average <- ema average + (1 - ema) adapter after each epoch. Evaluations are those of the trained adapter, or with --ema-eval of
  the average.
- --proximal L adds L mean((v - v_ref)^2) to the loss of every sample. The surrogate holds v along d alone, and not at all where
  the branches have one reward. --relative-proximal L adds L |dR| mean((v - v_ref)^2), which fits a reward of any scale, with the dR
  of --residual where that is on.
- --noise-weight multiplies a sample's loss by a power of its noise level, with mean 1 over the grid.
- --gain-power draws an epoch's prompts by what they still have to gain: with a probability that follows
  (101 - mean reward of the prompt)^Q. A prompt that was not drawn yet counts as the mean of those that were. Only here do an
  epoch's draws depend on the run's history.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from common import Cost, Prompted, Rival, RivalOptions, move_average, row_batches
from loop import main
from pydantic import Field
from variant_math import best_and_worst, deviation, gain_probabilities, noise_weights

from fdfo.config.errors import UserError
from fdfo.config.options import Count, NotNegative, Positive
from fdfo.distributed.launch import run_command_line
from fdfo.method.estimator import own_direction, surrogate_loss
from fdfo.method.prepare import Run
from fdfo.method.rollout import FIRST_CHURN, NOISED_ANEW, START, standard_normal
from fdfo.method.sampling import noised, prior_gammas, raw_gammas, sample_pairs
from fdfo.method.update import squared_distance

GAIN = 0x6A  # stream of the draw of prompts


@dataclass(frozen=True)
class VariantOptions(RivalOptions):
    """Train the tiny preset with FDFO and changes to it."""

    group: Annotated[int, Field(ge=2, le=1_000_000, multiple_of=2)] = 2
    """K: branches of a start; 2 is FDFO's pair"""
    starts_per_prompt: Count = 1
    """M: starts of a prompt in an epoch, which has the fewer prompts then"""
    baseline: Literal["start", "best-worst", "prompt"] = "start"
    """dx and dR are deviations from the mean of the start's branches, of its best and its worst branch, or of all the prompt's images"""
    twin: NotNegative = 1.0
    """weight of FDFO's loss, whose d points along dx"""
    residual: NotNegative = 0.0
    """weight of a loss whose d points from the image that the network expects of a latent to the one that came"""
    states: Literal["trajectory", "fresh"] = "trajectory"
    """what is trained on: the latents of the trajectory, or the final latents, noised anew to the same noise levels"""
    learning_rate: Positive = 2e-4
    """AdamW learning rate"""
    clip_range: Positive = 0.2
    """eps of the surrogate loss: how far the ratio may move from 1"""
    churn: Positive = 0.02
    """amount of churn: gamma at every noise level, or with --schedule prior the logarithm of 1 + gamma at the start"""
    schedule: Literal["raw", "prior"] = "raw"
    """where branches part: at every noise level, or in the starting noise alone, where a churn of 8 makes them independent"""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """draw with an average of the adapter that keeps this share of itself an epoch; 0: with the adapter itself"""
    ema_eval: bool = False
    """evaluate the average"""
    proximal: NotNegative = 0.0
    """L: weight of the squared distance to the velocity that sampled"""
    relative_proximal: NotNegative = 0.0
    """the same, as a multiple of each image's |dR|"""
    noise_weight: float = 0.0
    """P: weigh samples by sigma^P, or by (1 - sigma)^-P if it is below 0"""
    gain_power: NotNegative = 0.0
    """Q: draw prompts by the power Q of what they still have to gain; 0: in the order of train.py"""

    @property
    def per_prompt(self) -> int:
        return self.group * self.starts_per_prompt

    def check(self) -> None:
        super().check()
        if self.baseline == "best-worst" and self.group == 2:
            raise UserError("--baseline best-worst has no effect on the 2 branches of --group 2: give a larger --group.")
        if self.baseline == "prompt" and self.starts_per_prompt == 1:
            raise UserError("--baseline prompt has no effect with one start a prompt: give more --starts-per-prompt.")
        if self.ema_eval and not self.ema:
            raise UserError("--ema-eval has no effect without --ema: give both, or leave it out.")


class FdfoVariant(Rival):
    """FDFO, with the trajectories of the epoch under way. Sample i is solver step i % T of the kept image i // T."""

    name = "fdfo_variants"

    def __init__(self, run: Run, options: VariantOptions):
        self.run, self.options, self.T = run, options, run.config.sample.num_solver_steps
        self.grid = run.model.sigmas(self.T, run.config.sample.resolution)  # [T + 1]
        self.weights = noise_weights(self.grid, options.noise_weight).to(run.model.device)  # [T]
        self.average = [parameter.detach().clone() for parameter in run.model.trainable()]
        self.means = np.full(len(run.prompts), np.nan)  # of each prompt's rewards: the last images count half
        kept = 2 * options.images // options.group if options.baseline == "best-worst" else options.images
        self.samples = kept * self.T
        forwards = options.images * self.T * (2 if options.states == "fresh" else 1)  # to draw, and v_ref
        self.cost = Cost(options.images, forwards, self.samples)

    def averaged(self, wanted: bool) -> contextlib.AbstractContextManager:
        """Return a context in which the model has the average adapter if that is wanted, else its own."""
        return self.run.model.adapter_of(self.average) if wanted else contextlib.nullcontext()

    def evaluated(self) -> contextlib.AbstractContextManager:
        return self.averaged(self.options.ema_eval)

    def prompts(self, epoch: int, count: int) -> list[str]:
        if not self.options.gain_power:
            return super().prompts(epoch, count)
        likely = gain_probabilities(self.means, self.options.gain_power)
        draw = np.random.default_rng([self.run.config.seed, epoch, GAIN])
        self.chosen = draw.choice(len(likely), count, replace=False, p=likely)
        return [self.run.prompts[i] for i in self.chosen]

    @torch.no_grad()
    def sample(self, images: Prompted) -> torch.Tensor:
        """Draw all branches (docs/method.md 2): K / 2 pairs of a start begin alike, and differ in their churn."""
        self.images, K, kept, final = images, self.options.group, [], []
        size = max(1, 2 * self.run.plan.sample_batch // K) * K
        with self.averaged(self.options.ema > 0):
            for rows in row_batches(len(images.prompts), size, self.run.model.device):
                steps = []
                final.append(self.sample_rows(rows, lambda _, x, v, steps=steps: steps.append(torch.stack([x, v]))))
                if self.options.states == "fresh":
                    steps = self.noise_anew(rows, final[-1])
                kept.append(torch.stack(steps, dim=2).flatten(1, 2))  # [2, n T, C, H, W]
        self.x, self.v_ref = torch.cat(kept, dim=1)  # [N T, C, H, W] each
        self.final = torch.cat(final)
        return self.final

    def noise_anew(self, rows: torch.Tensor, final: torch.Tensor) -> list[torch.Tensor]:
        """Noise final latents [n, C, H, W] to each level of the grid -> latents and the network's v, [2, n, C, H, W] for each."""
        velocity, steps = self.run.model.velocity_at(self.images.text(rows), None, 1.0), []
        shape, K, epoch = final.shape[1:], self.options.group, self.images.epoch
        for step, sigma in enumerate(self.grid[:-1]):
            streams = ((row // K, NOISED_ANEW + K * step + row % K) for row in rows.tolist())
            noise = torch.stack([standard_normal(shape, self.run.config.seed, epoch, *stream) for stream in streams])
            x = noised(final, sigma.repeat(len(rows)).to(final.device), noise.to(final.device))
            steps.append(torch.stack([x, velocity(x, sigma.item())]))
        return steps

    def sample_rows(self, rows: torch.Tensor, keep: Callable[[int, torch.Tensor, torch.Tensor], None]) -> torch.Tensor:
        """Draw the images of some whole starts: rows [n] -> final latents [n, C, H, W]. keep: see sample_pairs."""
        model, config, epoch, K = self.run.model, self.run.config, self.images.epoch, self.options.group
        shape, starts = model.latent_shape(config.sample.resolution), (rows[::K] // K).tolist()

        def draw(size: tuple[int, ...], stream: int) -> list[torch.Tensor]:
            return [standard_normal(size, config.seed, epoch, start, stream) for start in starts]

        x_init = torch.stack(draw(shape, START)).to(model.device).repeat_interleave(K // 2, dim=0)  # [n / 2, C, H, W]
        return sample_pairs(
            model.velocity_at(self.images.text(rows), None, 1.0), x_init, self.grid,
            self.gammas(len(x_init)),
            lambda step: torch.cat(draw((K, *shape), FIRST_CHURN + step)).to(model.device), keep,
        )  # fmt: skip

    def gammas(self, pairs: int) -> torch.Tensor:
        """Return the churn of some pairs (docs/method.md 2): [P, T + 1]."""
        if self.options.schedule == "raw":
            return raw_gammas(self.grid, pairs, self.options.churn)
        return prior_gammas(self.grid, torch.full((pairs,), self.options.churn, dtype=torch.float64))

    def judge(self, rewards: torch.Tensor) -> None:
        """Take the deviations (docs/method.md 3) of the kept images."""
        options = self.options
        if options.baseline == "best-worst":
            self.kept, group = best_and_worst(rewards, options.group), 2
        else:
            self.kept = torch.arange(len(rewards), device=rewards.device)
            group = options.per_prompt if options.baseline == "prompt" else options.group
        self.dx, self.dR = deviation(self.final[self.kept], group), deviation(rewards[self.kept], group)
        self.dR_prompt = deviation(rewards, options.per_prompt)[self.kept]
        if options.gain_power:
            new, old = rewards.view(-1, options.per_prompt).mean(1).double().cpu().numpy(), self.means[self.chosen]
            self.means[self.chosen] = np.where(np.isnan(old), new, (old + new) / 2)

    def loss(self, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the weighted surrogate loss (docs/method.md 4) of some samples."""
        model, options, place, step = self.run.model, self.options, batch // self.T, batch % self.T
        row = self.kept[place]
        x, v_ref = (stored[row * self.T + step] for stored in (self.x, self.v_ref))
        sigma = self.grid.to(model.device)[step]
        v = model.velocity(x, sigma, self.images.text(row), None, 1.0)
        twin, ratio = surrogate_loss(v, v_ref, self.dx[place], self.dR[place], options.clip_range)
        loss = options.twin * twin
        if options.residual > 0:
            d = own_direction(x, v_ref, sigma, self.final[row])
            added, ratio = surrogate_loss(v, v_ref, d, self.dR_prompt[place], options.clip_range)
            loss = loss + options.residual * sigma * added
        if options.proximal > 0 or options.relative_proximal > 0:
            size = (self.dR_prompt if options.residual > 0 else self.dR)[place].abs()
            loss = loss + (options.proximal + options.relative_proximal * size) * squared_distance(v, v_ref)
        return self.weights[step] * loss, {"ratio_mean": ratio, "clipfrac": (ratio - 1).abs() > options.clip_range}

    def finish(self, epochs: int) -> None:
        """Move the average adapter."""
        move_average(self.average, self.run.model.trainable(), self.options.ema)


if __name__ == "__main__":
    run_command_line(lambda: main(VariantOptions, FdfoVariant))
