"""The training loop (METHOD.md 2 to 4), one stage a line."""

import math
import time

import torch

from fdfo.checkpoint import Checkpoint, save_checkpoint
from fdfo.config import TrainConfig, UserError
from fdfo.distributed import Job
from fdfo.logger import StageClock, peak_memory_gib, versions
from fdfo.model import FlowModel
from fdfo.preparation import Run, prepare
from fdfo.prompts import epoch_prompts
from fdfo.rollout import Differences, check_first_scores, encode_prompts, gather_scores, sample_share, score_share
from fdfo.update import StepStats, optimizer_step, step_samples
from rewards import describe


def train(job: Job, config: TrainConfig, checkpoint: Checkpoint | None) -> Run:
    """Trains to config.num_epochs epochs, from the start or from a checkpoint, and returns the finished run."""
    run = prepare(job, config, checkpoint)
    log, clock = run.log, StageClock(job.device)
    facts = {"processes": job.world_size, "device": str(job.device), "compile_seconds": run.compile_seconds}
    log.write("start", run.epochs_done, versions=versions(), scorers=describe(run.reward.scorers), **facts)
    announce(job, config, run)
    pairs = job.share(config.total_pairs_per_epoch)
    model, start = run.model, run.epochs_done
    for epoch in range(start, config.num_epochs):
        with clock.stage("encode"):
            prompts = epoch_prompts(run.prompts, epoch, config.total_pairs_per_epoch, config.seed)[pairs.start : pairs.stop]
            text, guidance_text = encode_prompts(model, prompts, config)
        with clock.stage("sample"):
            rollout = sample_share(model, config, run.plan, epoch, pairs, prompts, text, guidance_text)
        with clock.stage("decode"):
            images = model.decode(rollout.final)
        with clock.stage("reward"):
            differences = score_share(rollout, images, run.reward)
        if run.samples_seen == 0:
            check_first_scores(gather_scores(job, differences.scores))
        steps, untrained = [], lora_b(model) if run.samples_seen == 0 else None
        with clock.stage("update"):
            for samples, total in step_samples(run.plan, config, epoch, pairs):
                stats = optimizer_step(
                    job, model, config, run.plan, rollout, differences, guidance_text, samples, total,
                    run.optimizer, run.scale, first=epoch == start and not steps,
                )  # fmt: skip
                if untrained is not None and stats.applied:
                    check_adapter_moved(untrained, lora_b(model))
                    untrained = None
                steps.append(stats)
                run.samples_seen += total
                log.write("step", epoch + 1, step=len(steps), **vars(stats))
        run.epochs_done = epoch + 1
        report_epoch(job, config, run, clock, differences, steps)
        with clock.stage("checkpoint"):  # after the log, so that a checkpoint never lacks its epoch's line
            if run.epochs_done % config.save_freq == 0 or run.epochs_done == config.num_epochs:
                job.on_main(
                    lambda: save_checkpoint(run.folder, run.epochs_done, model, run.optimizer, run.scale, run.samples_seen)
                )
    return run


def lora_b(model: FlowModel) -> list[torch.Tensor]:
    """Copies of the LoRA's B matrices."""
    return [p.detach().clone() for name, p in model.named_trainable() if "lora_B" in name]


def check_adapter_moved(before: list[torch.Tensor], after: list[torch.Tensor]) -> None:
    """The first update must move B. Raises UserError where nothing moved."""
    if all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        raise UserError(
            "The first update left the adapter where it was: check the learning rate and that pairs differ in reward."
        )


def announce(job: Job, config: TrainConfig, run: Run) -> None:
    parameters = run.model.trainable()
    count = sum(p.numel() for p in parameters)
    rewards = " + ".join(f"{weight:g} {name}" for name, weight in run.reward.weights.items())
    job.print(
        f"model: {config.pretrained_model} ({config.precision}) on {job.device.type}, LoRA of {len(parameters) // 2} modules, {count:,} parameters"
    )
    job.print(f"reward: {rewards}; {len(run.prompts)} prompts; churn {config.churn.schedule}")
    job.print(run.plan.describe())
    job.print(f"run folder: {run.folder}")


def report_epoch(
    job: Job, config: TrainConfig, run: Run, clock: StageClock, differences: Differences, steps: list[StepStats]
) -> None:
    """One log object and one console line of an epoch, from the scores of the whole job."""
    scores = gather_scores(job, differences.scores | {"reward": differences.reward, "dropped": differences.dropped.float()})
    dropped = torch.tensor(scores.pop("dropped")).bool()
    reward = torch.tensor(scores.pop("reward"), dtype=torch.float64)
    pairs = reward.view(-1, 2)[~dropped[::2]]  # [P, 2]
    seconds = clock.read()
    values = {
        "reward_mean": float(pairs.mean()),
        "reward_std": float(pairs.std()),
        "scores": {name: finite_mean(values) for name, values in scores.items()},
        "differing_pairs": float((pairs[:, 0] != pairs[:, 1]).double().mean()),
        "reward_difference": float((pairs[:, 0] - pairs[:, 1]).abs().mean()),
        "dropped_pairs": int(dropped.sum()) // 2,
        "skipped_steps": sum(not step.applied for step in steps),
        "clipfrac": mean([step.clipfrac for step in steps]),
        "loss": mean([step.loss for step in steps]),
        "grad_norm": mean([step.grad_norm for step in steps]),
        "ratio_first": steps[0].ratio_first,
    }
    run.log.write("epoch", run.epochs_done, **values, seconds=seconds, peak_memory_gib=peak_memory_gib(job.device))
    job.print(
        f"{time.strftime('%H:%M:%S')} epoch {run.epochs_done}/{config.num_epochs}: reward {values['reward_mean']:.3f} +- "
        f"{values['reward_std']:.3f}, pairs that differ {values['differing_pairs']:.0%}, clipfrac {values['clipfrac']:.2f}, "
        f"grad norm {values['grad_norm']:.3g}, {sum(seconds.values()):.1f} s"
    )


def finite_mean(values: list[float]) -> float:
    return mean([value for value in values if math.isfinite(value)])


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
