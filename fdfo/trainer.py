"""The training loop (METHOD.md 2 to 4), one stage a line."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fdfo.checkpoint import Checkpoint
from fdfo.config import TrainConfig, UserError
from fdfo.console import announce, command, report_epoch, report_evaluation, resume_command, strict_stop
from fdfo.distributed import Job
from fdfo.health import one_colour
from fdfo.heldout import draw_held_out, score_held_out
from fdfo.logger import evaluation_due
from fdfo.memory import fitting_plan
from fdfo.meters import StageClock, versions
from fdfo.model import FlowModel, quantised
from fdfo.preemption import Stopped, guarded
from fdfo.preparation import Run, prepare
from fdfo.prompts import epoch_prompts
from fdfo.record import best_of, record
from fdfo.rollout import Differences, Rollout, check_first_scores, encode_prompts, gather_scores, sample_share, score_share
from fdfo.sheets import ShownPair, pair_sheet, save_sheet
from fdfo.stages import Stages
from fdfo.training_state import adapter_copy, point_to_best, prune_checkpoints, save_checkpoint
from fdfo.update import EpochData, optimizer_step, step_samples
from rewards import describe

SHOWN_PAIRS = 8  # of a sheet


def train(job: Job, config: TrainConfig, checkpoint: Checkpoint | None, started: Path | None = None) -> Run:
    """Trains to config.num_epochs epochs, from the start or from a checkpoint, and returns the finished run.

    started: the run folder to begin again in, of a run that has no checkpoint. Raises Stopped, with a checkpoint written,
    when a signal asks for it.
    """
    run = prepare(job, config, checkpoint, started)
    job.on_main(lambda: point_to_best(run.folder, best_of(run)))
    facts = {"processes": job.world_size, "device": str(job.device), "compile_seconds": run.compile_seconds}
    scorers = run.reward.scorers if run.held_out is None else run.held_out.scorers
    facts |= {"command": command(job), "versions": versions(), "scorers": describe(scorers)}
    run.log.write("start", run.progress.epochs, **facts)
    run.plan = fitting_plan(job, config, run.model, run.plan)
    announce(job, config, run)
    with guarded(job, config.timeout_minutes) as guard:
        stages = Stages(job, StageClock(job.device), guard)
        try:
            evaluate(job, config, run, stages)
            while run.progress.epochs < config.num_epochs:
                train_epoch(job, config, run, stages)
                evaluate(job, config, run, stages)
        except Stopped as stopped:
            job.on_main(lambda: keep(config, run))
            job.print(f"{stopped}; go on with\n  {resume_command(job, config, run)}")
            run.log.close()
            raise
    return run


@dataclass
class Experience:
    """What a rank's share of an epoch gives the update."""

    rollout: Rollout
    differences: Differences
    one_colour: torch.Tensor  # [2P], 1 where the picture is of one colour
    shown: list[ShownPair]  # for the sheet of pairs; empty where no evaluation follows the epoch


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
    due = evaluated_after(config, run, progress.epochs)
    if due:
        path = run.folder / "samples" / f"pairs-{progress.epochs:07d}.jpg"
        job.on_main(lambda: save_sheet(pair_sheet(experience.shown), path))
    with stages("checkpoint", epoch + 1):  # after the log, so that a checkpoint never lacks its epoch's line
        if progress.epochs % config.save_freq == 0 or progress.epochs == config.num_epochs or due or stop:
            job.on_main(lambda: keep(config, run))
    if stop:
        raise strict_stop(run, warnings)


def collect(job: Job, config: TrainConfig, run: Run, stages: Stages) -> Experience:
    """Everything up to the update, by the adapter of the epoch's start."""
    epoch, model, pairs = run.progress.epochs, run.model, job.share(config.total_pairs_per_epoch)
    with stages("encode", epoch + 1):
        prompts = epoch_prompts(run.prompts, epoch, config.total_pairs_per_epoch, config.seed)[pairs.start : pairs.stop]
        text, empty = encode_prompts(model, prompts, config)
    with stages("sample", epoch + 1, total=len(pairs), unit="pairs"):
        rollout = sample_share(model, config, run.plan, epoch, pairs, prompts, text, empty, stages.progress)
    with stages("decode", epoch + 1):
        images = model.decode(rollout.final)
    with stages("reward", epoch + 1):
        differences = score_share(rollout, images, run.reward)
    if run.progress.samples == 0:
        check_first_scores(gather_scores(job, differences.scores))
    if all(job.gather_objects(bool(differences.dropped.all()))):
        raise UserError(
            f"No pair of epoch {epoch + 1} has finite pictures and rewards, so the adapter has broken: go on from an earlier checkpoint "
            "with a lower --train.learning-rate."
        )
    shown = shown_pairs(rollout, differences, images) if evaluated_after(config, run, epoch + 1) else []
    return Experience(rollout, differences, one_colour(images), shown)


def shown_pairs(rollout: Rollout, differences: Differences, images: torch.Tensor) -> list[ShownPair]:
    """This rank's pairs that differ most in reward, the largest difference first: images [2P, 3, H, W] in [0, 1]."""
    order = differences.dR[::2].abs().argsort(descending=True, stable=True)[:SHOWN_PAIRS].tolist()
    pictures = quantised(images[[2 * k + i for k in order for i in (0, 1)]])
    rewards = differences.reward.view(-1, 2).tolist()
    return [
        ShownPair(rollout.prompts[k], pictures[2 * i : 2 * i + 2], (rewards[k][0], rewards[k][1])) for i, k in enumerate(order)
    ]


def update(job: Job, config: TrainConfig, run: Run, stages: Stages, experience: Experience) -> None:
    """The optimizer steps of the epoch that are not done yet."""
    progress, model, epoch = run.progress, run.model, run.progress.epochs
    untrained = lora_b(model) if progress.samples == 0 else None
    data = EpochData(model, config, run.plan, experience.rollout, experience.differences)
    steps = step_samples(run.plan, config, epoch, job.share(config.total_pairs_per_epoch))
    for number, (samples, total) in list(enumerate(steps))[len(progress.steps) :]:
        with stages("update", epoch + 1, number, len(samples), "samples"):
            first = epoch == run.first_epoch and number == 0
            stats = optimizer_step(job, data, samples, total, run.optimizer, run.scale, first, stages.asked)
        if stats is None:  # a rank was asked to stop
            stages.guard.enter(f"step {number + 1} of the update of epoch {epoch + 1}")
        if untrained is not None and stats.applied:
            check_adapter_moved(untrained, lora_b(model))
            untrained = None
        progress.steps.append(stats)
        progress.samples += total
        run.log.write("step", epoch + 1, step=len(progress.steps), **vars(stats))
    if not any(step.applied for step in progress.steps):
        raise UserError(
            f"No optimizer step of epoch {epoch + 1} had a finite gradient: look at the reward's size, or go on from an earlier "
            "checkpoint with a lower --train.learning-rate."
        )


def evaluated_after(config: TrainConfig, run: Run, epochs: int) -> bool:
    """Whether the run evaluates after that many epochs."""
    return run.held_out is not None and evaluation_due(config, epochs)


def evaluate(job: Job, config: TrainConfig, run: Run, stages: Stages) -> None:
    """The evaluation on held-out prompts that is due where the run is, unless the log has it already."""
    epoch, held_out = run.progress.epochs, run.held_out
    if run.progress.steps or not evaluated_after(config, run, epoch):
        return
    if job.on_main(lambda: any(line["epoch"] == epoch for line in run.log.evaluations)):
        return
    total = len(held_out.own) * held_out.repeats
    with stages("evaluate", epoch, total=total, unit="pictures"):
        images, finite = draw_held_out(run.model, config, run.plan, held_out, stages.progress)
    with stages("evaluate", epoch):
        evaluation = score_held_out(job, epoch, held_out, images, finite)
    seconds = stages.clock.take("evaluate")
    warnings = job.on_main(lambda: record(config, run, evaluation, images[:: held_out.repeats], seconds))
    report_evaluation(job, run, warnings, seconds)
    if config.strict and warnings:
        raise strict_stop(run, warnings)


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
    save_checkpoint(run.folder, config, run.prompts, run.progress, run.model, run.optimizer, run.scale)
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
