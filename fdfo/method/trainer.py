"""The training loop, one stage after the other (docs/method.md 2 to 4)."""

import dataclasses
import sys
from dataclasses import dataclass

import torch

from fdfo.config.errors import UserError, or_warn
from fdfo.config.options import deciding_settings
from fdfo.config.train_options import TrainConfig
from fdfo.distributed.job import Job
from fdfo.distributed.machine import StageClock, memory_gib, peak_memory_gib, versions
from fdfo.distributed.shutdown import Stopped, guarded
from fdfo.distributed.stages import Stages
from fdfo.evaluation.health import (
    EpochScores,
    check_adapter_moved,
    check_first_scores,
    check_pairs_left,
    check_ratio,
    epoch_numbers,
    gather_scores,
    relative_change,
)
from fdfo.evaluation.record import best_of
from fdfo.evaluation.statistics import mean
from fdfo.method.evaluate import evaluate, evaluated_after, prune, strict_stop
from fdfo.method.prepare import Run, announce, prepare
from fdfo.method.rollout import Differences, PairShare, Rollout, sample_share, score_share, weigh_again
from fdfo.method.update import EpochData, optimizer_step, step_samples
from fdfo.model.images import finite_rows, one_colour, quantised
from fdfo.model.memory import fitting_plan
from fdfo.report.console import launcher, print_epoch, resume_command
from fdfo.report.sheets import ShownPair, pair_sheet, save_sheet
from fdfo.run_folder.save_checkpoint import point_to_best, save_checkpoint
from fdfo.run_folder.start import FRESH, Start
from fdfo.storage.prompts import epoch_prompts, prompts_hash
from rewards.scorer import describe
from rewards.spread import Spread

SHOWN_PAIRS = 8  # of a sheet


def train(job: Job, config: TrainConfig, start: Start = FRESH) -> Run:
    """Train until config.num_epochs epochs are done, and return the finished run.

    Raises UserError; raises Stopped, with a checkpoint written, if a signal asks for it.
    """
    run = prepare(job, config, start)
    job.on_main(lambda: point_to_best(run.folder, best_of(run.log, run.held_out)))
    scorers = run.judges.reward.scorers | ({} if run.held_out is None else run.judges.metrics)
    run.log.write(
        "start", run.progress.epochs, processes=job.world_size, device=str(job.device), compile_seconds=run.compile_seconds,
        command=[*launcher(job), *sys.argv], versions=versions(), scorers=describe(scorers), changed=run.changed,
    )  # fmt: skip
    run.plan = fitting_plan(job, config, run.model, run.plan)
    announce(run)
    with guarded(job, config.timeout_minutes) as guard:
        stages = Stages(job, StageClock(job.device), guard)
        if run.people is not None:
            stages.tell = run.people.tell
        try:
            evaluate(run, stages)
            while run.progress.epochs < config.num_epochs:
                train_epoch(run, stages)
                evaluate(run, stages)
        except Stopped as stopped:
            job.on_main(lambda: save(run))
            job.print(f"{stopped}; resume with\n  {resume_command(job, config, run.folder)}")
            run.log.close()
            raise
        finally:
            if run.people is not None:
                run.people.close()
    return run


@dataclass
class Experience:
    """What a rank's share of an epoch gives the update."""

    rollout: Rollout
    differences: Differences
    one_colour: torch.Tensor  # [2P], 1 for an image of one colour
    scores: dict[str, list[float]]  # [2P] each, of the whole job in global order
    spread: Spread  # of the scorers' differences, with this epoch's
    shown: list[ShownPair]  # for the sheet of pairs; empty if no evaluation follows the epoch


def train_epoch(run: Run, stages: Stages) -> None:
    """Train one epoch, or the rest of one that was stopped inside its update; then write a checkpoint if one is due."""
    progress, epoch = run.progress, run.progress.epochs
    if not progress.steps:
        progress.epoch_start = run.model.adapter_copy()
    with run.model.adapter_of(progress.epoch_start):
        experience = collect(run, stages)
    run.job.on_main(lambda: prune(run))  # the newest checkpoint has shown that it draws images
    update(run, stages, experience)
    warnings = finish_epoch(run, stages, experience)
    stop, due = run.config.strict and bool(warnings), evaluated_after(run, progress.epochs)
    if due:
        path = run.folder / "samples" / f"pairs-{progress.epochs:07d}.jpg"
        run.job.on_main(lambda: or_warn(lambda: save_sheet(pair_sheet(experience.shown), path)))
    with stages("checkpoint", epoch + 1):  # after the log, so that a checkpoint never lacks its epoch's line
        if progress.epochs % run.config.save_freq == 0 or progress.epochs == run.config.num_epochs or due or stop:
            run.job.on_main(lambda: save(run))
    if stop:
        raise strict_stop(run, warnings)


def collect(run: Run, stages: Stages) -> Experience:
    """Sample, decode and score this rank's pairs with the adapter of the epoch's start."""
    config, model, epoch = run.config, run.model, run.progress.epochs
    pairs = run.job.share(config.total_pairs_per_epoch)
    with stages("encode", epoch + 1):
        prompts = epoch_prompts(run.prompts, epoch, config.total_pairs_per_epoch, config.seed)[pairs.start : pairs.stop]
        share = PairShare(epoch, pairs, prompts, *model.encode_prompts(prompts, config.sample.guidance_scale))
    if run.people is None:
        with stages("sample", epoch + 1, total=len(pairs), unit="pairs"):
            rollout = sample_share(model, config, run.plan, share, stages.progress)
        with stages("decode", epoch + 1):
            images = model.decode(rollout.final)
    else:
        rollout, images = sample_for_people(run, stages, share)
    with stages("reward", epoch + 1):
        differences, reward = score_share(rollout, images, run.judges.reward), run.judges.reward
    scores = gather_scores(run.job, differences.scores)
    if run.progress.samples == 0:
        check_first_scores(scores, reward.judges)
    spread = run.progress.spread.after(scores)
    if config.reward_scale == "std":
        weigh_again(differences, spread.divide(reward.weights))
    check_pairs_left(run.job, epoch + 1, differences.dropped, finite_rows(images), differences.scores)
    shown = shown_pairs(rollout, differences, images) if evaluated_after(run, epoch + 1) else []
    return Experience(rollout, differences, one_colour(images), scores, spread, shown)


def sample_for_people(run: Run, stages: Stages, share: PairShare) -> tuple[Rollout, torch.Tensor]:
    """Sample this rank's pairs, show each batch to the people as soon as it is decoded, and wait until they have judged all."""
    people, plan, images = run.people, run.plan, []
    batches = -(-max(plan.pairs) // plan.sample_batch)  # of the rank that has most; every rank offers as often
    people.open_epoch(share.epoch, share.pairs, under_way=bool(run.progress.steps))

    def show(rollout: Rollout, batch: range) -> None:
        rows, own = slice(2 * batch.start, 2 * batch.stop), slice(batch.start, batch.stop)
        images.append(run.model.decode(rollout.final[rows]))
        people.offer(share.pairs[own], share.prompts[own], quantised(images[-1]), stages)

    with stages("sample", share.epoch + 1, total=len(share.pairs), unit="pairs"):
        rollout = sample_share(run.model, run.config, plan, share, after_batch=show)
        for _ in range(batches - len(images)):
            people.offer(share.pairs[len(share.pairs) :], [], images[-1][:0], stages)
    with stages("votes", share.epoch + 1, total=run.config.total_pairs_per_epoch, unit="pairs judged"):
        people.wait(stages)
    return rollout, torch.cat(images)


def shown_pairs(rollout: Rollout, differences: Differences, images: torch.Tensor) -> list[ShownPair]:
    """Return this rank's pairs that differ most in reward, the largest difference first: images [2P, 3, H, W] in [0, 1]."""
    order = differences.dR[::2].abs().argsort(descending=True, stable=True)[:SHOWN_PAIRS].tolist()
    shown = quantised(images[[2 * k + i for k in order for i in (0, 1)]])
    rewards = differences.reward.view(-1, 2).tolist()
    return [
        ShownPair(rollout.share.prompts[k], shown[2 * i : 2 * i + 2], (rewards[k][0], rewards[k][1])) for i, k in enumerate(order)
    ]


def update(run: Run, stages: Stages, experience: Experience) -> None:
    """Take the optimizer steps of the epoch that are not done yet."""
    learner, job, config = run.learner, run.job, run.config
    progress, epoch = learner.progress, learner.progress.epochs
    untrained = learner.model.lora_b() if progress.samples == 0 else None
    data = EpochData(learner.model, config, run.plan, experience.rollout, experience.differences)
    steps = step_samples(run.plan, config, epoch, job.share(config.total_pairs_per_epoch))
    for number, samples in list(enumerate(steps))[len(progress.steps) :]:
        with stages("update", epoch + 1, number, len(samples.own), "samples"):
            stats = optimizer_step(job, learner, data, samples, stages.asked)
        if stats is None:  # a rank was asked to stop
            stages.guard.enter(f"step {number + 1} of the update of epoch {epoch + 1}")
        if epoch == run.first_epoch and number == 0:
            check_ratio(stats.ratio_first, config.precision)
        if untrained is not None and stats.applied and (stats.grad_norm > 0 or not run.judges.reward.judges):  # ties pull nowhere
            check_adapter_moved(untrained, learner.model.lora_b())
            untrained = None
        progress.steps.append(stats)
        progress.samples += samples.total
        run.log.write("step", epoch + 1, step=len(progress.steps), **vars(stats))
    if not any(step.applied for step in progress.steps):
        raise UserError(
            f"No optimizer step of epoch {epoch + 1} had a finite gradient: look at the reward's size, or resume from an earlier "
            "checkpoint with a lower --train.learning-rate."
        )


def finish_epoch(run: Run, stages: Stages, experience: Experience) -> list[str]:
    """Count the epoch, log and print it; return the warnings of its health."""
    progress, job, found = run.progress, run.job, experience.differences
    extra = {"reward": found.reward, "dropped": found.dropped, "one colour": experience.one_colour}
    lists = gather_scores(job, extra)
    epoch = EpochScores(
        reward=lists["reward"],
        dropped=lists["dropped"],
        one_colour=lists["one colour"],
        scores=experience.scores,
        judges=run.judges.reward.judges,
    )
    steps, progress.steps, progress.epochs, progress.spread = progress.steps, [], progress.epochs + 1, experience.spread
    numbers = epoch_numbers(epoch, steps, relative_change(progress.epoch_start, run.model.adapter_copy()))
    warnings = job.on_main(
        lambda: run.health.check(numbers, epoch.broken, mean(epoch.one_colour), steps)
    )  # rank 0 alone has read the log of a resumed run
    seconds = stages.clock.read()
    memory = {"memory_gib": memory_gib(job.device), "peak_memory_gib": peak_memory_gib(job.device)}
    spread = {name: progress.spread.of(name) for name in found.scores}
    run.log.write("epoch", progress.epochs, **numbers, spread=spread, warnings=warnings, seconds=seconds, **memory)
    print_epoch(job, f"{progress.epochs}/{run.config.num_epochs}", numbers, sum(seconds.values()), warnings)
    return warnings


def save(run: Run) -> None:
    """Write the checkpoint of where the run is. Raises UserError if its weights are not finite."""
    if not all(parameter.isfinite().all() for parameter in run.model.trainable()):
        raise UserError(
            f"The adapter's weights are not finite in epoch {run.progress.epochs + 1}, so no checkpoint of it is written: resume "
            f"{run.folder} with a lower --train.learning-rate."
        )
    state = dataclasses.replace(
        run.learner.state(), settings=deciding_settings(run.config), prompts=prompts_hash(run.prompts),
        evaluated=[line["epoch"] for line in run.log.evaluations],
    )  # fmt: skip
    save_checkpoint(run.folder, run.config, run.model, state)
