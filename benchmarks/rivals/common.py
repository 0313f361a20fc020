"""What the rivals share: the tiny preset's run, groups of images, optimizer steps, evaluations and the log.

A rival trains the model, LoRA, reward and prompts of `train.py --preset tiny`, with as many images and optimizer steps an epoch. Its
evaluations are those of train.py, and its log has the same lines, so that learning.py and learning_tables.py read it. The lines of
epochs also say what an epoch costs. A rival runs in one process, in float32, and writes no checkpoints.
"""

import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import torch
from pydantic import Field

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from learning_tables import Cost  # noqa: E402

from fdfo.config.command_line import parse  # noqa: E402
from fdfo.config.errors import UserError  # noqa: E402
from fdfo.config.options import Count, Options, Positive, to_json  # noqa: E402
from fdfo.config.presets import PRESETS  # noqa: E402
from fdfo.config.train_options import TrainConfig  # noqa: E402
from fdfo.distributed.job import Job  # noqa: E402
from fdfo.distributed.launch import start_job  # noqa: E402
from fdfo.distributed.machine import StageClock, versions  # noqa: E402
from fdfo.distributed.shutdown import Stopped, guarded  # noqa: E402
from fdfo.distributed.stages import Stages  # noqa: E402
from fdfo.method.evaluate import evaluate  # noqa: E402
from fdfo.method.prepare import Run, prepare  # noqa: E402
from fdfo.method.rollout import standard_normal  # noqa: E402
from fdfo.model.text import TextEmbeddings  # noqa: E402
from fdfo.run_folder.start import FRESH  # noqa: E402
from fdfo.storage.prompts import epoch_prompts  # noqa: E402
from rewards.scorer import describe  # noqa: E402

RIVAL = "rival.json"  # beside config.json: the rival's own options


@dataclass(frozen=True)
class RivalOptions(Options):
    num_epochs: Count = 200
    """epochs of the run"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 6
    """seed of the order of prompts, the noise, the LoRA's start and the order of samples"""
    out: Path = Path("runs")
    """folder that gets the run's folder"""
    images: Count = 2 * PRESETS["tiny"].total_pairs_per_epoch
    """images an epoch"""
    group: Annotated[int, Field(ge=2, le=1_000_000)] = 8
    """images of a prompt, which are each other's baseline"""
    learning_rate: Positive = 3e-4
    """AdamW learning rate"""
    fall_to: Positive = 1.0
    """the learning rate falls linearly, to this share of it in the last epoch; 1: it stays"""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = PRESETS["tiny"].train.adam_beta2
    """AdamW beta2"""
    max_grad_norm: Positive = PRESETS["tiny"].train.max_grad_norm
    """norm to which the gradient of an optimizer step is clipped"""
    optimizer_steps: Count = PRESETS["tiny"].gradient_steps_per_epoch
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
                f"--images {self.images} is no even number of images, {self.per_prompt} for each prompt: change one of the two."
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
    tiny = PRESETS["tiny"]
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


def learning_rate(options: RivalOptions, epoch: int) -> float:
    """Return the learning rate of an epoch, counted from 0."""
    return options.learning_rate * (1 + (options.fall_to - 1) * epoch / max(1, options.num_epochs - 1))


def move_average(average: list[torch.Tensor], parameters: list[torch.nn.Parameter], rate: float) -> None:
    """Move an average of the adapter to the adapter: average <- rate average + (1 - rate) parameters."""
    with torch.no_grad():
        for mean, parameter in zip(average, parameters, strict=True):
            mean.mul_(rate).add_(parameter, alpha=1 - rate)


def train_rival(job: Job, options: RivalOptions, kind: type) -> Run:
    """Train with a rival, and return the finished run. Raises UserError; raises Stopped if a signal asks for it."""
    run = prepare(job, tiny_config(options, kind.name), FRESH)
    (run.folder / RIVAL).write_text(to_json(options), encoding="utf-8")
    scorers = run.judges.reward.scorers | run.judges.metrics
    run.log.write(
        "start", 0, processes=1, device=str(job.device), compile_seconds=None, command=list(sys.argv), versions=versions(),
        scorers=describe(scorers), changed={},
    )  # fmt: skip
    job.print(f"run folder: {run.folder}")
    rival = kind(run, options)
    with guarded(job, run.config.timeout_minutes) as guard:
        stages = Stages(job, StageClock(job.device), guard)
        with rival.evaluated():
            evaluate(run, stages)
        while run.progress.epochs < options.num_epochs:
            train_epoch(run, rival, options, stages)
            with rival.evaluated():
                evaluate(run, stages)
    return run


def train_epoch(run: Run, rival: Rival, options: RivalOptions, stages: Stages) -> None:
    """Train one epoch: draw, score, update, log."""
    epoch, config, model = run.progress.epochs, run.config, run.model
    with stages("sample", epoch + 1):
        prompts = rival.prompts(epoch, options.images // options.per_prompt)
        texts = model.encode_prompts(prompts, 1.0)[0]
        images = Prompted(epoch, [prompt for prompt in prompts for _ in range(options.per_prompt)], texts, options.per_prompt)
        decoded = model.decode(rival.sample(images))  # [N, 3, height, width]
    with stages("score", epoch + 1):
        scores = run.judges.reward.score(images.prompts, decoded)
        rewards = run.judges.reward.total(scores)
        rival.judge(rewards)
    for group in run.learner.optimizer.param_groups:
        group["lr"] = learning_rate(options, epoch)
    order, steps = np.random.default_rng([config.seed, epoch, 0x5A]).permutation(rival.samples), []
    for number, part in enumerate(np.array_split(order, config.gradient_steps_per_epoch)):
        with stages("update", epoch + 1, number):
            steps.append(optimizer_step(run, rival, torch.from_numpy(part)))
        run.log.write("step", epoch + 1, step=number + 1, **steps[-1])
    rival.finish(epoch + 1)
    run.progress.epochs += 1
    means = {name: float(np.mean([step[name] for step in steps])) for name in steps[0] if name != "applied"}
    run.log.write(
        "epoch", epoch + 1, reward_mean=float(rewards.mean()), reward_std=float(rewards.std()),
        scores={name: float(values.mean()) for name, values in scores.items()}, **means,
        skipped_steps=sum(not step["applied"] for step in steps), warnings=[], cost=dataclasses.asdict(rival.cost),
        seconds=stages.clock.read(),
    )  # fmt: skip
    print(f"epoch {epoch + 1}/{config.num_epochs}: reward {float(rewards.mean()):.2f}", flush=True)


def optimizer_step(run: Run, rival: Rival, samples: torch.Tensor) -> dict[str, float | bool]:
    """Take one optimizer step on the mean loss of some samples [n], and return its numbers; skip one that is not finite."""
    optimizer, parameters, sums = run.learner.optimizer, run.model.trainable(), {}
    optimizer.zero_grad()
    for batch in samples.to(run.model.device).split(run.config.max_batch_size):
        loss, numbers = rival.loss(batch)
        (loss.sum() / len(samples)).backward()
        for name, values in {"loss": loss, **numbers}.items():
            sums[name] = sums.get(name, 0) + values.detach().double().sum()
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.config.train.max_grad_norm)
    means = {name: float(value) / len(samples) for name, value in sums.items()}
    applied = bool(norm.isfinite()) and bool(np.isfinite(means["loss"]))
    if applied:
        optimizer.step()
    optimizer.zero_grad()
    return means | {"grad_norm": float(norm), "applied": applied}


def main(options: type[RivalOptions], kind: type) -> None:
    """Train with a rival from the command line."""
    given = parse(options, sys.argv[1:])
    with start_job() as job:
        try:
            train_rival(job, given, kind)
        except Stopped as stopped:
            job.print(f"{stopped}; the log ends there")
