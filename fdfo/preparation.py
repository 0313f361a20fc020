"""What a training run needs before its first epoch: everything checked and loaded, and only then a run folder."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fdfo.checkpoint import AUTO, Checkpoint, saved_config
from fdfo.config import TrainConfig, UserError
from fdfo.distributed import Job, check_device
from fdfo.health import Health
from fdfo.hub import fetch_prompt_set
from fdfo.logger import RunLog, check_writable, claim, create_run_folder, reopen_run_folder
from fdfo.model import FlowModel
from fdfo.plan import BatchPlan, plan_batches
from fdfo.prompts import load_prompts
from fdfo.training_state import Progress, check_resume, load_training_state
from fdfo.update import LossScale, make_optimizer
from rewards import SET_SCORERS, Scorer, WeightedReward, build_scorers, check_prompts, check_scorer_name, reward_weights


@dataclass
class Run:
    """Everything that a training run holds between epochs."""

    folder: Path
    log: RunLog
    plan: BatchPlan
    prompts: list[str]
    model: FlowModel
    reward: WeightedReward
    optimizer: torch.optim.AdamW
    scale: LossScale
    progress: Progress
    first_epoch: int  # index of the epoch that this process begins with
    health: Health
    heldout: dict[str, Scorer]  # scorers of the comparison at the end
    compile_seconds: float | None  # None where nothing is compiled


def prepare(job: Job, config: TrainConfig, checkpoint: Checkpoint | None, started: Path | None = None) -> Run:
    """Checks everything that can be checked, loads the models, and only then makes or reopens the run folder.

    started: the run folder to begin again in, of a run that has no checkpoint.
    """
    check_device(config.precision, job.device)
    plan = plan_batches(config, job.world_size)
    weights = reward_weights(config.reward_preset, config.reward_specs)
    prompts = job.on_main(lambda: load_prompts(fetch_prompt_set(config.prompt_set)))
    check_heldout(job, config)
    resumed = checkpoint is not None and checkpoint.resumable
    check_writable(checkpoint.run if resumed else config.runs_dir)
    if resumed:
        check_resume(config, saved_config(checkpoint))
    model = load_model(job, config, checkpoint)
    compile_seconds = accelerate(job, config, plan, model)
    optimizer = make_optimizer(model, config)
    progress, scale = Progress(), LossScale.start(config.precision)
    if resumed:
        progress, scale = load_training_state(checkpoint, config, model, optimizer)
        if progress.epochs > config.num_epochs or (progress.epochs == config.num_epochs and config.resume_from != AUTO):
            raise UserError(f"{checkpoint.run} has {progress.epochs} epochs already: give a larger --num-epochs to go on.")
    names = {*weights, *heldout_metrics(config)}
    scorers = build_scorers(names, job, config.vlm_model_name, config.vlm_use_fsdp, config.offload_scorers)
    reward = WeightedReward(weights, {name: scorers[name] for name in weights})
    check_prompts(reward.scorers, prompts)
    heldout = {name: scorers[name] for name in heldout_metrics(config)}
    folder = open_folder(job, config, checkpoint, started, progress)
    log = RunLog(folder, config, progress.epochs, len(progress.steps), job.is_main)
    health = Health(config.precision, log.gradient_norms)
    return Run(
        folder, log, plan, prompts, model, reward, optimizer, scale, progress, progress.epochs, health, heldout, compile_seconds
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


def check_heldout(job: Job, config: TrainConfig) -> None:
    """Raises UserError when the comparison at the end could not be made."""
    for metric in heldout_metrics(config):
        check_scorer_name(metric)
        if metric in SET_SCORERS:
            raise UserError(f"The comparison draws one picture a prompt and {metric} needs two: leave it out and use metrics.py.")
    if config.heldout_prompt_set is None:
        return
    found = len(job.on_main(lambda: load_prompts(fetch_prompt_set(config.heldout_prompt_set))))
    if not job.world_size <= config.heldout_prompts <= found:
        raise UserError(
            f"--heldout-prompts is {config.heldout_prompts}: give a number from {job.world_size} (the processes) to {found} "
            f"(the prompts in {config.heldout_prompt_set})."
        )


def heldout_metrics(config: TrainConfig) -> tuple[str, ...]:
    return () if config.heldout_prompt_set is None else config.heldout_metrics


def load_model(job: Job, config: TrainConfig, checkpoint: Checkpoint | None) -> FlowModel:
    """The base model on its device, with a fresh adapter or the checkpoint's. Raises UserError where they do not fit."""
    model = FlowModel(config.pretrained_model, config.precision, job.device)
    model.latent_shape(config.sample.resolution)
    if checkpoint is None:
        model.add_lora(config.lora_rank, config.lora_alpha, config.seed)
    else:
        model.load_adapter(checkpoint.folder)
        check_lora_numbers(model, config, checkpoint)
    model.to_device(text_encoders=not config.memory_efficient)
    if config.gradient_checkpointing:
        model.checkpoint_gradients()
    return model


def accelerate(job: Job, config: TrainConfig, plan: BatchPlan, model: FlowModel) -> float | None:
    """Makes the model fast; returns the seconds that compiling took. Where it fails: one warning, and the run goes on eager."""
    rows = plan.train_batch if config.compile and job.device.type == "cuda" else None
    start = time.perf_counter()
    try:
        failure = model.accelerate(rows, config.sample.resolution)
    except torch.OutOfMemoryError:  # the trial before the first epoch finds the size that fits
        failure = None
    if failure is not None:
        job.print(f"warning: compiling failed, so the run goes on uncompiled and slower ({failure})")
    return None if rows is None or failure is not None else round(time.perf_counter() - start, 1)


def check_lora_numbers(model: FlowModel, config: TrainConfig, checkpoint: Checkpoint) -> None:
    lora = model.peft.peft_config["default"]
    if lora.use_dora or lora.lora_bias:
        raise UserError(f"The adapter in {checkpoint.folder} is more than a plain LoRA (DoRA or a bias): train from a plain one.")
    if (lora.r, lora.lora_alpha) != (config.lora_rank, config.lora_alpha):
        raise UserError(
            f"The adapter in {checkpoint.folder} has rank {lora.r} and alpha {lora.lora_alpha}: give --lora-rank {lora.r} "
            f"--lora-alpha {lora.lora_alpha}."
        )
