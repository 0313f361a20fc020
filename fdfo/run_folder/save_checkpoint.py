"""Saves and loads checkpoints: the adapter, and the state that resumes a run exactly, as plain values and tensors."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fdfo.config.errors import UserError
from fdfo.config.options import deciding_settings, flat
from fdfo.config.train_options import TrainConfig
from fdfo.model.flow_model import FlowModel
from fdfo.run_folder.find_checkpoint import (
    BEST,
    CARD,
    EPOCH_START,
    STATE,
    TENSORS,
    Checkpoint,
    all_checkpoints,
    checkpoint_name,
    epochs_and_steps,
    read_state,
)
from fdfo.run_folder.lora_file import scaled_lora, write_lora
from fdfo.run_folder.model_card import Origin, model_card
from fdfo.storage.atomic_files import atomic_folder, json_hash, remove_folder, seal
from fdfo.storage.hub import ADAPTER

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TrainingState:
    """What resumes a run, as JSON values and tensors on the CPU."""

    epochs: int  # whole ones
    steps: list[dict]  # statistics of the optimizer steps done in the next epoch
    samples: int
    loss_scale: dict
    optimizer: Tensors
    epoch_start: Tensors  # the adapter at the epoch's start; empty between epochs


def fixed_settings(config: TrainConfig) -> dict:
    """Return the settings that a resumed run shares with the run it continues: all that affect results, but for --train."""
    return {name: value for name, value in deciding_settings(config).items() if name != "train"}


def check_resume(config: TrainConfig, saved: TrainConfig) -> None:
    """Raise UserError, naming the flag, if a resumed run would not be the run that it continues."""
    before, now = flat(fixed_settings(saved)), flat(fixed_settings(config))
    for name, value in before.items():
        if value != now[name]:
            raise UserError(
                f"--{name.replace('_', '-')} was {value} in the run to resume and is {now[name]} now: leave it as it was, or start "
                "a new run."
            )


def save_checkpoint(run: Path, config: TrainConfig, prompts: list[str], model: FlowModel, state: TrainingState) -> None:
    """Write the checkpoint of this state, unless it is there. prompts: those to train on. Raises UserError."""
    final = run / "checkpoints" / checkpoint_name(state.epochs, len(state.steps))
    if final.exists():  # written by this process, since a resume sets aside the checkpoints after its own
        return
    values = {
        "epoch": state.epochs,
        "steps": state.steps,
        "samples": state.samples,
        "loss_scale": state.loss_scale,
        "settings": json_hash(fixed_settings(config)),
        "prompts": json_hash(prompts),
    }
    try:
        with atomic_folder(final) as folder:
            write_adapter(folder, config, model, state)
            save_file(state.optimizer, folder / TENSORS)
            if state.epoch_start:
                save_file(state.epoch_start, folder / EPOCH_START)
            seal(folder, STATE, values)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The checkpoint {final} cannot be written ({error}), and those before it are as they were: make room, then resume."
        ) from error


def write_adapter(folder: Path, config: TrainConfig, model: FlowModel, state: TrainingState) -> None:
    """Write the adapter in PEFT's format and in diffusers', and its model card."""
    lora, tensors = model.peft.peft_config["default"], model.adapter_state()
    lora.base_model_name_or_path = model.name
    lora.save_pretrained(str(folder))
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    write_lora(folder, scaled_lora(lora, tensors, folder))
    origin = Origin(model.name, config, True, config.sample.guidance_scale, state.epochs, len(state.steps))
    (folder / CARD).write_text(model_card(origin, merged=False), encoding="utf-8")


def load_checkpoint(checkpoint: Checkpoint, config: TrainConfig, prompts: list[str]) -> TrainingState:
    """Load the training state of a checkpoint; prompts: those to train on. Raises UserError if it is not this run's, or damaged."""
    values, folder = read_state(checkpoint.folder), checkpoint.folder
    if values.get("settings") != json_hash(fixed_settings(config)):
        raise UserError(f"{folder} is a checkpoint of a run with other settings: resume from one of this run.")
    if values.get("prompts") != json_hash(prompts):  # the order of prompts depends on their place in the set
        raise UserError(f"The prompts to train on are not those of {folder}: restore the prompt file, or start a new run.")
    try:
        epochs, steps = values["epoch"], values["steps"]
        start = load_file(folder / EPOCH_START) if steps else {}
        state = TrainingState(epochs, steps, values["samples"], values["loss_scale"], load_file(folder / TENSORS), start)
        if not folder.name.endswith(checkpoint_name(epochs, len(steps))):
            raise ValueError(f"it is the state of {checkpoint_name(epochs, len(steps))}")
        return state
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise damaged(checkpoint, error) from error


def damaged(checkpoint: Checkpoint, error: Exception) -> UserError:
    """Return the error for a training state that does not fit."""
    return UserError(f"The training state in {checkpoint.folder} is damaged ({error}): resume from another checkpoint.")


def prune_checkpoints(run: Path, keep_last: int | None, keep_every: int | None) -> None:
    """Delete old checkpoints inside epochs, and those after whole epochs that the two flags do not keep. Raises UserError."""
    found = all_checkpoints(run)
    whole = [folder for folder in found if epochs_and_steps(folder)[1] == 0]
    kept = set(whole if keep_last is None else whole[-keep_last:]) | {found[-1], (run / "checkpoints" / BEST).resolve()}
    if keep_every is not None:
        kept |= {folder for folder in whole if epochs_and_steps(folder)[0] % keep_every == 0}
    try:
        for folder in set(found) - kept:
            remove_folder(folder)
    except OSError as error:
        raise UserError(f"An old checkpoint in {run} cannot be deleted ({error}): fix that, then resume.") from error


def point_to_best(run: Path, epoch: int | None) -> None:
    """Link checkpoints/best to the checkpoint after that many epochs; remove the link for None. Raises UserError."""
    link = run / "checkpoints" / BEST
    partial = link.with_name(f".{BEST}.partial")
    try:
        partial.unlink(missing_ok=True)  # of a process that was killed
        if epoch is None:
            link.unlink(missing_ok=True)
        else:
            partial.symlink_to(checkpoint_name(epoch, 0))
            partial.rename(link)
    except OSError as error:
        raise UserError(f"{link} cannot be written ({error.strerror}): fix that, then resume.") from error
