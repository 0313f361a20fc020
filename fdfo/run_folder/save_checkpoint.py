"""Saves and loads checkpoints: the adapter, and the state that resumes a run exactly, as plain values and tensors."""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fdfo.config.errors import UserError
from fdfo.config.options import CHANGEABLE, deciding_settings, flag_of, marked
from fdfo.config.train_options import TrainConfig
from fdfo.model.flow_model import FlowModel
from fdfo.run_folder.find_checkpoint import (
    BEST,
    CARD,
    CONFIG,
    EPOCH_START,
    STATE,
    TENSORS,
    Checkpoint,
    all_checkpoints,
    checkpoint_name,
    epochs_and_steps,
    read_config,
    read_state,
)
from fdfo.run_folder.lora_file import scaled_lora, write_lora
from fdfo.run_folder.model_card import Origin, model_card
from fdfo.storage.atomic_files import atomic_folder, own_partial, remove_folder, seal
from fdfo.storage.hub import ADAPTER

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TrainingState:
    """What resumes a run, as JSON values and tensors on the CPU. Settings, prompts and evaluated say which run it is."""

    epochs: int  # whole ones
    steps: list[dict]  # statistics of the optimizer steps done in the next epoch
    samples: int
    loss_scale: dict
    optimizer: Tensors
    epoch_start: Tensors  # the adapter at the epoch's start; empty between epochs
    settings: dict | None = None  # that affect results, by dotted name; None in early versions
    prompts: str = ""  # hash of those to train on
    evaluated: list[int] = field(default_factory=list)  # epochs after which the run was evaluated so far
    spread: dict = field(default_factory=dict)  # of the scorers' differences; empty in early versions


def changed_settings(config: TrainConfig, run: Path, state: TrainingState) -> dict[str, tuple[object, object]]:
    """Return what a resumed run changes on purpose: the values before and now by dotted name, such as train.learning_rate.

    Raises UserError, naming the flag, if it changes another setting that affects results. Settings that are newer than the
    checkpoint had their default. A checkpoint without settings is of an early version: config.json stands for them.
    """
    now = deciding_settings(config)
    before = deciding_settings(TrainConfig()) | (state.settings or deciding_settings(read_config(run)))
    changed = {name: (before[name], value) for name, value in now.items() if value != before[name]}
    for name in changed.keys() - marked(TrainConfig, CHANGEABLE):
        raise UserError(
            f"{flag_of(name)} was {before[name]} in the run to resume and is {now[name]} now: leave it as it was, or start a new run."
        )
    return changed


def save_checkpoint(run: Path, config: TrainConfig, model: FlowModel, state: TrainingState) -> None:
    """Write the checkpoint of this state, unless it is there. Raises UserError."""
    final = run / "checkpoints" / checkpoint_name(state.epochs, len(state.steps))
    if final.exists():  # written by this process, since a resume sets aside the checkpoints after its own
        return
    values = {
        "epoch": state.epochs,
        "steps": state.steps,
        "samples": state.samples,
        "loss_scale": state.loss_scale,
        "settings": state.settings,
        "prompts": state.prompts,
        "evaluated": state.evaluated,
        "spread": state.spread,
    }
    try:
        if not (run / CONFIG).is_file():
            raise FileNotFoundError(f"{run} is gone, or its {CONFIG} is")
        final.parent.mkdir(exist_ok=True)
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
    lora, tensors = copy.copy(model.peft.peft_config["default"]), model.adapter_state()
    lora.base_model_name_or_path, lora.target_modules = model.name, sorted(lora.target_modules)
    lora.save_pretrained(str(folder))
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    write_lora(folder, scaled_lora(lora, tensors, folder))
    origin = Origin(type(model.family), model.name, config, True, config.sample.guidance_scale, state.epochs, len(state.steps))
    (folder / CARD).write_text(model_card(origin, merged=False), encoding="utf-8")


def load_checkpoint(checkpoint: Checkpoint) -> TrainingState:
    """Load the training state of a checkpoint. Raises UserError if it is damaged."""
    values, folder = read_state(checkpoint.folder), checkpoint.folder
    try:
        epochs, steps = values["epoch"], values["steps"]
        start = load_file(folder / EPOCH_START) if steps else {}
        state = TrainingState(
            epochs, steps, values["samples"], values["loss_scale"], load_file(folder / TENSORS), start,
            values["settings"] if isinstance(values["settings"], dict) else None,
            values["prompts"], [int(epoch) for epoch in values.get("evaluated", [])],
            values.get("spread", {}),
        )  # fmt: skip
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
    kept = {*(whole if keep_last is None else whole[-keep_last:]), *found[-1:], (run / "checkpoints" / BEST).resolve()}
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
    try:
        if epoch is None:
            link.unlink(missing_ok=True)
        else:
            partial = own_partial(link)
            partial.symlink_to(checkpoint_name(epoch, 0))
            partial.rename(link)
    except OSError as error:
        raise UserError(f"{link} cannot be written ({error.strerror}): fix that, then resume.") from error
