"""Trains a rival: an epoch's images, scores and optimizer steps, the evaluations, and the log.

The evaluations are those of train.py, and the log has the same lines, so that learning.py and learning_tables.py read it. The lines of
epochs also say what an epoch costs. A rival runs in one process, in float32, and writes no checkpoints.
"""

import dataclasses
import sys

import numpy as np
import torch
from common import Prompted, Rival, RivalOptions, tiny_config

from fdfo.config.command_line import parse
from fdfo.config.options import to_json
from fdfo.distributed.job import Job
from fdfo.distributed.launch import start_job
from fdfo.distributed.machine import StageClock, versions
from fdfo.distributed.shutdown import Stopped, guarded
from fdfo.distributed.stages import Stages
from fdfo.method.evaluate import evaluate
from fdfo.method.prepare import Run, prepare
from fdfo.run_folder.start import FRESH
from rewards.scorer import describe

RIVAL = "rival.json"  # beside config.json: the rival's own options


def learning_rate(options: RivalOptions, epoch: int) -> float:
    """Return the learning rate of an epoch, counted from 0."""
    return options.learning_rate * (1 + (options.fall_to - 1) * epoch / max(1, options.num_epochs - 1))


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
