"""The training loop (METHOD.md 2 to 4), one stage a line."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fdfo.checkpoint import Checkpoint
from fdfo.config import TrainConfig, UserError
from fdfo.distributed import Job
from fdfo.health import one_colour
from fdfo.logger import StageClock, versions
from fdfo.memory import fitting_plan
from fdfo.model import FlowModel, TextEmbeddings
from fdfo.preemption import Guard, LeaveStage, Stopped, guarded
from fdfo.preparation import Run, prepare
from fdfo.prompts import epoch_prompts
from fdfo.console import announce, report_epoch, resume_command, strict_stop
from fdfo.rollout import Differences, Rollout, check_first_scores, encode_prompts, gather_scores, sample_share, score_share
from fdfo.training_state import adapter_copy, prune_checkpoints, save_checkpoint
from fdfo.update import optimizer_step, step_samples
from rewards import describe


def train(job: Job, config: TrainConfig, checkpoint: Checkpoint | None, started: Path | None = None) -> Run:
    """Trains to config.num_epochs epochs, from the start or from a checkpoint, and returns the finished run.

    started: the run folder to begin again in, of a run that has no checkpoint. Raises Stopped, with a checkpoint written,
    when a signal asks for it.
    """
    run = prepare(job, config, checkpoint, started)
    facts = {"processes": job.world_size, "device": str(job.device), "compile_seconds": run.compile_seconds}
    run.log.write("start", run.progress.epochs, versions=versions(), scorers=describe(run.reward.scorers), **facts)
    announce(job, config, run)
    run.plan = fitting_plan(job, config, run.model, run.plan)
    with guarded(job, config.timeout_minutes) as guard:
        stages = Stages(StageClock(job.device), guard)
        try:
            while run.progress.epochs < config.num_epochs:
                train_epoch(job, config, run, stages)
            guard.enter("the comparison with the base model")
        except Stopped as stopped:
            job.on_main(lambda: keep(config, run))
            complete = run.progress.epochs == config.num_epochs
            job.print(
                f"{stopped}; " + ("the run is complete" if complete else f"go on with\n  {resume_command(job, config, run)}")
            )
            run.log.close()
            raise
    return run


@dataclass
class Stages:
    """Every stage of a run is timed, watched, and a place where all ranks can stop together."""

    clock: StageClock
    guard: Guard

    @contextlib.contextmanager
    def __call__(self, name: str, epoch: int, step: int | None = None) -> Iterator[None]:
        """A stage of the epoch with this index, and for the update of one of its steps. A rank that leaves it ends up behind it."""
        place = name if step is None else f"step {step + 1} of the {name}"
        self.guard.enter(f"{place} of epoch {epoch + 1}")
        with self.clock.stage(name), contextlib.suppress(LeaveStage):  # the next agreement stops all ranks
            yield


@dataclass
class Experience:
    """What a rank's share of an epoch gives the update."""

    rollout: Rollout
    differences: Differences
    one_colour: torch.Tensor  # [2P], 1 where the picture is of one colour
    guidance_text: TextEmbeddings | None


def train_epoch(job: Job, config: TrainConfig, run: Run, stages: Stages) -> None:
    """One epoch, or the rest of one that was stopped after some of its optimizer steps; then its checkpoint where one is due."""
    progress, epoch = run.progress, run.progress.epochs
    if not progress.steps:
        progress.epoch_start = adapter_copy(run.model)
    with adapter_of(run.model, progress.epoch_start):
        experience = collect(job, config, run, stages)
    update(job, config, run, stages, experience)
    steps, progress.steps, progress.epochs = progress.steps, [], epoch + 1
    warnings = report_epoch(job, config, run, stages.clock.read(), experience.differences, experience.one_colour, steps)
    stop = config.strict and bool(warnings)
    with stages("checkpoint", epoch):  # after the log, so that a checkpoint never lacks its epoch's line
        if progress.epochs % config.save_freq == 0 or progress.epochs == config.num_epochs or stop:
            job.on_main(lambda: keep(config, run))
    if stop:
        raise strict_stop(run, warnings)


def collect(job: Job, config: TrainConfig, run: Run, stages: Stages) -> Experience:
    """Everything up to the update, by the adapter of the epoch's start."""
    epoch, model, pairs = run.progress.epochs, run.model, job.share(config.total_pairs_per_epoch)
    with stages("encode", epoch):
        prompts = epoch_prompts(run.prompts, epoch, config.total_pairs_per_epoch, config.seed)[pairs.start : pairs.stop]
        text, guidance_text = encode_prompts(model, prompts, config)
    with stages("sample", epoch):
        rollout = sample_share(
            model, config, run.plan, epoch, pairs, prompts, text, guidance_text, stages.guard.pulse_or_leave
        )  # fmt: skip
    with stages("decode", epoch):
        images = model.decode(rollout.final)
    with stages("reward", epoch):
        differences = score_share(rollout, images, run.reward)
    if run.progress.samples == 0:
        check_first_scores(gather_scores(job, differences.scores))
    return Experience(rollout, differences, one_colour(images), guidance_text)


def update(job: Job, config: TrainConfig, run: Run, stages: Stages, experience: Experience) -> None:
    """The optimizer steps of the epoch that are not done yet."""
    progress, model, epoch = run.progress, run.model, run.progress.epochs
    untrained = lora_b(model) if progress.samples == 0 else None
    steps = step_samples(run.plan, config, epoch, job.share(config.total_pairs_per_epoch))
    for number, (samples, total) in list(enumerate(steps))[len(progress.steps) :]:
        with stages("update", epoch, number):
            stats = optimizer_step(
                job, model, config, run.plan, experience.rollout, experience.differences, experience.guidance_text, samples, total,
                run.optimizer, run.scale, first=epoch == run.first_epoch and number == 0, asked=stages.guard.asked,
            )  # fmt: skip
        if stats is None:  # a rank was asked to stop
            stages.guard.enter(f"step {number + 1} of the update of epoch {epoch + 1}")
        if untrained is not None and stats.applied:
            check_adapter_moved(untrained, lora_b(model))
            untrained = None
        progress.steps.append(stats)
        progress.samples += total
        run.log.write("step", epoch + 1, step=len(progress.steps), **vars(stats))


@contextlib.contextmanager
def adapter_of(model: FlowModel, weights: list[torch.Tensor]) -> Iterator[None]:
    """The adapter has these parameters inside, and its own again afterwards."""
    own = adapter_copy(model)
    set_adapter(model, weights)
    try:
        yield
    finally:
        set_adapter(model, own)


@torch.no_grad()
def set_adapter(model: FlowModel, weights: list[torch.Tensor]) -> None:
    for parameter, value in zip(model.trainable(), weights, strict=True):
        parameter.copy_(value)


def keep(config: TrainConfig, run: Run) -> None:
    """Writes the checkpoint of where the run is, and deletes those that are no longer wanted."""
    save_checkpoint(run.folder, config, run.progress, run.model, run.optimizer, run.scale)
    prune_checkpoints(run.folder, config.keep_last, config.keep_every)


def lora_b(model: FlowModel) -> list[torch.Tensor]:
    """Copies of the LoRA's B matrices."""
    return [p.detach().clone() for name, p in model.named_trainable() if "lora_B" in name]


def check_adapter_moved(before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    """The first update must move B. Raises UserError where nothing moved."""
    if all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        raise UserError(
            "The first update left the adapter where it was: check the learning rate and that pairs differ in reward."
        )
