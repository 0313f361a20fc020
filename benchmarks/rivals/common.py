"""What the rivals share: options, the images of an epoch, and what a method has to do.

A rival trains the model, LoRA, reward and prompts of `train.py --preset tiny-published`, by default with as many images and
optimizer steps an epoch. loop.py trains it.
"""

import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import torch
from pydantic import Field

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from learning_tables import Cost  # noqa: E402

from fdfo.config.errors import UserError  # noqa: E402
from fdfo.config.options import Count, Options, Positive  # noqa: E402
from fdfo.config.presets import PRESETS  # noqa: E402
from fdfo.config.train_options import TrainConfig  # noqa: E402
from fdfo.method.prepare import Run  # noqa: E402
from fdfo.method.rollout import standard_normal  # noqa: E402
from fdfo.model.text import TextEmbeddings  # noqa: E402
from fdfo.storage.prompts import epoch_prompts  # noqa: E402


@dataclass(frozen=True)
class RivalOptions(Options):
    num_epochs: Count = 200
    """epochs of the run"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 6
    """seed of the order of prompts, the noise, the LoRA's start and the order of samples"""
    out: Path = Path("runs")
    """folder that gets the run's folder"""
    images: Count = 2 * PRESETS["tiny-published"].total_pairs_per_epoch
    """images an epoch"""
    group: Annotated[int, Field(ge=2, le=1_000_000)] = 8
    """images of a prompt, which are each other's baseline"""
    learning_rate: Positive = 3e-4
    """AdamW learning rate"""
    fall_to: Positive = 1.0
    """the learning rate falls linearly, to this share of it in the last epoch; 1: it stays"""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = PRESETS["tiny-published"].train.adam_beta2
    """AdamW beta2"""
    max_grad_norm: Positive = PRESETS["tiny-published"].train.max_grad_norm
    """norm to which the gradient of an optimizer step is clipped"""
    optimizer_steps: Count = PRESETS["tiny-published"].gradient_steps_per_epoch
    """optimizer steps an epoch"""
    eval_every: Count = 10
    """epochs between evaluations"""
    eval_prompts: Annotated[int | None, Field(ge=2, le=512)] = None
    """number of held-out prompts: 128 if left out, as in train.py"""
    max_batch_size: Count = 256
    """largest micro-batch"""

    @property
    def per_prompt(self) -> int:
        """Return the images of a prompt in an epoch."""
        return self.group

    def check(self) -> None:
        """Raise UserError for values that no run can have together."""
        if self.images % self.per_prompt or self.images % 2:
            raise UserError(
                f"--images {self.images} should be even and a multiple of the {self.per_prompt} images of a prompt: change one of the two."
            )


@dataclass(frozen=True)
class Prompted:
    """The images to draw in an epoch; those of a prompt lie together."""

    epoch: int
    prompts: list[str]  # [N], one for each image
    texts: TextEmbeddings  # N / per_prompt rows, on the device
    per_prompt: int

    def text(self, rows: torch.Tensor) -> TextEmbeddings:
        """Return the text of some images: rows [n] int64, on the device -> n rows."""
        return self.texts.rows(rows // self.per_prompt)


class Rival(Protocol):
    """A method, with what it keeps of the epoch under way: S samples to train on."""

    name: str
    run: Run
    cost: Cost  # of an epoch
    samples: int  # S

    def prompts(self, epoch: int, count: int) -> list[str]:
        """Return the different prompts of an epoch: those of train.py, unless a method chooses others."""
        return epoch_prompts(self.run.prompts, epoch, count, self.run.config.seed)

    def sample(self, images: Prompted) -> torch.Tensor:
        """Draw the images -> final latents [N, C, H, W]."""

    def judge(self, rewards: torch.Tensor) -> None:
        """Take the images' rewards [N]."""

    def loss(self, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of some samples, with a graph, and numbers for the log: batch [n] int64 on the device -> [n], [n] each."""

    def finish(self, epochs: int) -> None:
        """End an epoch after its optimizer steps. epochs: those done."""

    def evaluated(self) -> contextlib.AbstractContextManager:
        """Return the context of an evaluation, in which the model has the weights to evaluate: those trained, unless a method has others."""
        return contextlib.nullcontext()


def tiny_config(options: RivalOptions, name: str) -> TrainConfig:
    """Return the tiny preset with a rival's options. Raises UserError for options that do not fit together."""
    options.check()
    tiny = PRESETS["tiny-published"]
    optimizer = {field: getattr(options, field) for field in ("learning_rate", "adam_beta2", "max_grad_norm")}
    return dataclasses.replace(
        tiny, train=dataclasses.replace(tiny.train, **optimizer), seed=options.seed, runs_dir=options.out, run_name=name,
        num_epochs=options.num_epochs, total_pairs_per_epoch=options.images // 2, gradient_steps_per_epoch=options.optimizer_steps,
        eval_every=options.eval_every, eval_prompts=options.eval_prompts, max_batch_size=options.max_batch_size,
    )  # fmt: skip


def row_batches(count: int, size: int, device: torch.device) -> list[torch.Tensor]:
    """Return the numbers of `count` images on the device, at most `size` at a time: int64."""
    return list(torch.arange(count, device=device).split(size))


def image_noise(run: Run, epoch: int, rows: torch.Tensor, stream: int) -> torch.Tensor:
    """Draw Gaussian noise for some images of an epoch from their numbers alone: rows [n] -> [n, C, H, W] on the device."""
    shape, seed = run.model.latent_shape(run.config.sample.resolution), run.config.seed
    draws = [standard_normal(shape, seed, epoch, row, stream) for row in rows.tolist()]
    return torch.stack(draws).to(run.model.device)


def move_average(average: list[torch.Tensor], parameters: list[torch.nn.Parameter], rate: float) -> None:
    """Move an average of the adapter to the adapter: average <- rate average + (1 - rate) parameters."""
    with torch.no_grad():
        for mean, parameter in zip(average, parameters, strict=True):
            mean.mul_(rate).add_(parameter, alpha=1 - rate)
