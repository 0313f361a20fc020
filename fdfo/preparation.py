"""What a training run needs before its first epoch: everything checked and loaded, and only then a run folder."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from fdfo.checkpoint import AUTO, Checkpoint, guidance_warning, saved_config
from fdfo.config import TrainConfig, UserError
from fdfo.distributed import Job, check_device
from fdfo.health import Health
from fdfo.heldout import HeldOut, PromptSplit, prepare_held_out, split_prompts
from fdfo.logger import RunLog, read_log
from fdfo.lora_file import check_plain
from fdfo.manifest import text_sum
from fdfo.model import FlowModel
from fdfo.plan import BatchPlan, plan_batches
from fdfo.run_folder import check_writable, claim, create_run_folder, reopen_run_folder
from fdfo.training_state import Progress, check_resume, load_training_state
from fdfo.update import LossScale, make_optimizer
from rewards import (
    VLM_SCORERS,
    VLM_TRAINING_SCORERS,
    WeightedReward,
    build_scorers,
    check_prompts,
    check_scorer_name,
    reward_weights,
)


@dataclass
class Run:
    """Everything that a training run holds between epochs."""

    folder: Path
    log: RunLog
    plan: BatchPlan
    prompts: list[str]  # to train on
    model: FlowModel
    reward: WeightedReward
    optimizer: torch.optim.AdamW
    scale: LossScale
    progress: Progress
    first_epoch: int  # index of the first epoch that this process does from its start
    health: Health
    held_out: HeldOut | None
    compile_seconds: float | None  # None where nothing is compiled


def prepare(job: Job, config: TrainConfig, checkpoint: Checkpoint | None, started: Path | None = None) -> Run:
    """Checks everything that can be checked, loads the models, and only then makes or reopens the run folder.

    started: the run folder to begin again in, of a run that has no checkpoint.
    """
    check_device(config.precision, job.device)
    plan = plan_batches(config, job.world_size)
    weights = reward_weights(config.reward_preset, config.reward_specs)
    split = job.on_main(lambda: split_prompts(config))
    metrics = config.eval_metrics if split.held_out else ()
    for metric in metrics:
        check_scorer_name(metric)
    resumed = checkpoint is not None and checkpoint.resumable
    own = checkpoint.run if resumed else started
    check_writable(own or config.runs_dir)
    if resumed:
        check_resume(config, saved_config(checkpoint))
    if own is not None:
        job.on_main(lambda: check_same_prompts(own, split.held_out))
    model = load_model(job, config, checkpoint)
    compile_seconds = accelerate(job, config, plan, model)
    optimizer = make_optimizer(model, config)
    progress, scale = Progress(), LossScale.start(config.precision)
    if resumed:
        progress, scale = load_training_state(checkpoint, config, split.training, model, optimizer)
        if progress.epochs > config.num_epochs or (
            config.resume_from != AUTO and complete(job, config, split, checkpoint, progress)
        ):
            raise UserError(f"{checkpoint.run} has {progress.epochs} epochs already: give a larger --num-epochs to go on.")
    scorers = build_scorers(
        dict.fromkeys((*weights, *metrics)),
        job,
        config.vlm_model_name,
        config.vlm_use_fsdp,
        waiting_scorers(config, weights, metrics),
    )
    reward = WeightedReward(weights, {name: scorers[name] for name in weights})
    check_prompts(reward.scorers, split.training)
    check_prompts(scorers, split.held_out)
    held_out = prepare_held_out(job, config, model, split.held_out, weights, scorers)
    folder = open_folder(job, config, checkpoint, started, progress)
    log = RunLog(folder, config, progress.epochs, len(progress.steps), job.is_main)
    health = Health(config.precision, log.gradient_norms)
    first_epoch = progress.epochs + (1 if progress.steps else 0)
    return Run(
        folder, log, plan, split.training, model, reward, optimizer, scale, progress, first_epoch, health, held_out, compile_seconds,
    )  # fmt: skip


def waiting_scorers(config: TrainConfig, weights: Collection[str], metrics: Collection[str]) -> set[str]:
    """The scorers that leave the GPU between two calls: all with --offload-scorers, else those of evaluations alone.

    A VLM stays, since one that is sharded cannot leave.
    """
    if config.offload_scorers:
        return {*weights, *metrics}
    return set(metrics) - set(weights) - {*VLM_SCORERS, *VLM_TRAINING_SCORERS}


def complete(job: Job, config: TrainConfig, split: PromptSplit, checkpoint: Checkpoint, progress: Progress) -> bool:
    """Whether the run to resume has nothing left to do, its last evaluation included."""
    if progress.epochs < config.num_epochs:
        return False
    lines = job.on_main(lambda: evaluation_lines(checkpoint.run))
    return not split.held_out or any(line["epoch"] == progress.epochs for line in lines)


def evaluation_lines(run: Path) -> list[dict]:
    """What the log of a run to resume says of its evaluations."""
    path = run / "training_log.jsonl"
    return [line for line in read_log(path) if line["kind"] == "eval"] if path.exists() else []


def check_same_prompts(run: Path, held_out: list[str]) -> None:
    """Raises UserError where the run was evaluated on other prompts, since evaluations are compared prompt by prompt."""
    now = text_sum(held_out)
    for line in evaluation_lines(run):
        if line["prompt_sum"] != now:
            raise UserError(
                f"The held-out prompts are not those on which {run} was evaluated after epoch {line['epoch']}: restore the prompt "
                "file, or start a new run."
            )


def open_folder(job: Job, config: TrainConfig, checkpoint: Checkpoint | None, started: Path | None, progress: Progress) -> Path:
    """The run folder: that of the checkpoint, or the one to begin again in, or a new one; says which."""
    resumed = checkpoint.run if checkpoint is not None and checkpoint.resumable else started
    if resumed is None:
        if checkpoint is not None:
            job.print(f"{checkpoint.folder} has an adapter but no training state: a new run starts from it at epoch 0")
        folder = job.on_main(lambda: create_run_folder(config))
        job.on_main(lambda: claim(folder))
        return folder
    job.on_main(lambda: claim(resumed))
    job.on_main(lambda: reopen_run_folder(resumed, config, (-1, 0) if started else (progress.epochs, len(progress.steps))))
    if started is not None:
        job.print(f"{resumed} has no whole checkpoint: beginning again in it")
    else:
        steps = f" and {len(progress.steps)} optimizer steps of the next" if progress.steps else ""
        job.print(f"resuming {resumed} after epoch {progress.epochs}{steps}")
    return resumed


def load_model(job: Job, config: TrainConfig, checkpoint: Checkpoint | None) -> FlowModel:
    """The base model on its device, with a fresh adapter or the checkpoint's. Raises UserError where they do not fit."""
    model = FlowModel(config.pretrained_model, config.precision, job.device)
    model.latent_shape(config.sample.resolution)
    if checkpoint is None:
        model.add_lora(config.lora_rank, config.lora_alpha, config.seed)
    else:
        model.load_adapter(checkpoint.folder)
        check_lora_numbers(model, config, checkpoint)
        if warning := guidance_warning(checkpoint, config.sample.guidance_scale, "--sample.guidance-scale"):
            job.print(warning)
    model.to_device(text_encoders=not config.memory_efficient)
    if config.gradient_checkpointing:
        model.checkpoint_gradients()
    return model


def accelerate(job: Job, config: TrainConfig, plan: BatchPlan, model: FlowModel) -> float | None:
    """Makes the model fast; returns the seconds that compiling took. Where it fails on a rank: one warning, and that one goes on eager."""
    rows = plan.train_batch if config.compile and job.device.type == "cuda" else None
    start = time.perf_counter()
    try:
        failure = model.accelerate(rows, config.sample.resolution)
    except torch.OutOfMemoryError:  # the trial before the first epoch finds the size that fits
        failure = None
    failures = {rank: reason for rank, reason in enumerate(job.gather_objects(failure)) if reason is not None}
    if failures:
        rank = min(failures)
        job.print(
            f"warning: compiling failed on {len(failures)} of {job.world_size} processes, which go on uncompiled and slower; on rank "
            f"{rank}: {failures[rank]}"
        )
    return None if rows is None or failures else round(time.perf_counter() - start, 1)


def check_lora_numbers(model: FlowModel, config: TrainConfig, checkpoint: Checkpoint) -> None:
    lora = model.peft.peft_config["default"]
    check_plain(lora, checkpoint.folder)
    if (lora.r, lora.lora_alpha) != (config.lora_rank, config.lora_alpha):
        raise UserError(
            f"The adapter in {checkpoint.folder} has rank {lora.r} and alpha {lora.lora_alpha}: give --lora-rank {lora.r} "
            f"--lora-alpha {lora.lora_alpha}."
        )
