"""The state that resumes a run exactly, written beside the adapter: whole epochs, or an epoch and some of its steps."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fdfo.checkpoint import (
    BEST,
    CARD,
    EPOCH_START,
    FIXED_ON_RESUME,
    STATE,
    TENSORS,
    Checkpoint,
    all_checkpoints,
    checkpoint_name,
    position,
    read_state,
)
from fdfo.config import TrainConfig, UserError
from fdfo.config_file import config_to_dict
from fdfo.hub import ADAPTER
from fdfo.lora_file import scaled_lora, write_lora
from fdfo.manifest import remove_folder, seal, text_sum, whole_folder
from fdfo.model import FlowModel
from fdfo.model_card import Origin, model_card
from fdfo.update import LossScale, StepStats


@dataclass
class Progress:
    """How far a run is. A run that is stopped inside an epoch samples the epoch again and leaves out the steps done."""

    epochs: int = 0  # whole ones
    steps: list[StepStats] = field(default_factory=list)  # optimizer steps done of the next epoch
    samples: int = 0  # optimizer steps' samples so far; 0 before the first update
    epoch_start: list[torch.Tensor] = field(default_factory=list)  # the adapter that samples the next epoch, on the CPU


def adapter_copy(model: FlowModel) -> list[torch.Tensor]:
    """The adapter's parameters as they are now, on the CPU."""
    return [parameter.detach().to("cpu", copy=True) for parameter in model.trainable()]


def fixed_settings(config: TrainConfig) -> dict:
    """What a resumed run has to have in common with the run it continues, as JSON values; micro-batches may differ."""
    values = {name: config_to_dict(config)[name] for name in FIXED_ON_RESUME}
    values["sample"].pop("batch_size")
    return values


def check_resume(config: TrainConfig, saved: TrainConfig) -> None:
    """Raises UserError when a resumed run would no longer be the run it continues."""
    before, now = fixed_settings(saved), fixed_settings(config)
    for name in FIXED_ON_RESUME:
        if before[name] != now[name]:
            raise UserError(
                f"--{name.replace('_', '-')} was {before[name]} in the run to resume and is {now[name]} now: leave it as it was, "
                "or start a new run."
            )


def save_checkpoint(
    run: Path,
    config: TrainConfig,
    prompts: list[str],
    progress: Progress,
    model: FlowModel,
    optimizer: torch.optim.AdamW,
    scale: LossScale,
) -> Path:
    """Writes the checkpoint of this progress, unless it is there: adapter, optimizer, loss scale, counters, sums of the files.

    prompts: those that are trained on.
    """
    final = run / "checkpoints" / checkpoint_name(progress.epochs, len(progress.steps))
    if final.exists():  # written by this process, since one that resumes puts aside what its checkpoint does not lead to
        return final
    state = {
        "epoch": progress.epochs,
        "steps": [dataclasses.asdict(step) for step in progress.steps],
        "samples": progress.samples,
        "loss_scale": dataclasses.asdict(scale),
        "settings": text_sum(fixed_settings(config)),
        "prompts": text_sum(prompts),
    }
    try:
        with whole_folder(final) as folder:
            write_adapter(folder, config, progress, model)
            save_file(optimizer_tensors(model, optimizer), folder / TENSORS)
            if progress.steps:
                names = [name for name, _ in model.named_trainable()]
                save_file(dict(zip(names, progress.epoch_start, strict=True)), folder / EPOCH_START)
            seal(folder, STATE, state)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The checkpoint {final} cannot be written ({error}), and those before it are as they were: make room, then resume."
        ) from error
    return final


def write_adapter(folder: Path, config: TrainConfig, progress: Progress, model: FlowModel) -> None:
    """The adapter in PEFT's format and in diffusers', and its model card."""
    lora, tensors = model.peft.peft_config["default"], model.adapter_state()
    lora.base_model_name_or_path = model.name
    lora.save_pretrained(str(folder))
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    write_lora(folder, scaled_lora(lora, tensors, folder))
    origin = Origin(model.name, config, True, config.sample.guidance_scale, progress.epochs, len(progress.steps))
    (folder / CARD).write_text(model_card(origin, merged=False), encoding="utf-8")


def prune_checkpoints(run: Path, keep_last: int | None, keep_every: int | None) -> None:
    """Deletes checkpoints inside epochs that are left behind, and those after whole epochs that the two flags do not keep."""
    found = all_checkpoints(run)
    whole = [folder for folder in found if position(folder)[1] == 0]
    kept = set(whole if keep_last is None else whole[-keep_last:]) | {found[-1], (run / "checkpoints" / BEST).resolve()}
    if keep_every is not None:
        kept |= {folder for folder in whole if position(folder)[0] % keep_every == 0}
    try:
        for folder in set(found) - kept:
            remove_folder(folder)
    except OSError as error:
        raise UserError(f"An old checkpoint in {run} cannot be deleted ({error}): mend that, then resume.") from error


def point_to_best(run: Path, epoch: int | None) -> None:
    """Makes checkpoints/best a link to the checkpoint after that many epochs; takes it away for None."""
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
        raise UserError(f"{link} cannot be written ({error.strerror}): mend that, then resume.") from error


def optimizer_tensors(model: FlowModel, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """AdamW's state under the parameters' names."""
    tensors = {}
    for name, parameter in model.named_trainable():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}:{name}"] = value.detach().cpu().contiguous()
    return tensors


def load_training_state(
    checkpoint: Checkpoint, config: TrainConfig, prompts: list[str], model: FlowModel, optimizer: torch.optim.AdamW
) -> tuple[Progress, LossScale]:
    """Restores the optimizer, and returns how far the run is and its loss scale; prompts: those to train on. Raises UserError."""
    state = read_state(checkpoint.folder)
    if state.get("settings") != text_sum(fixed_settings(config)):
        raise UserError(f"{checkpoint.folder} is a checkpoint of a run with other settings: resume from one of this run.")
    if state.get("prompts") != text_sum(prompts):  # the order of prompts is by their place in the set
        raise UserError(
            f"The prompts to train on are not those of {checkpoint.folder}: restore the prompt file, or start a new run."
        )
    try:
        load_optimizer(load_file(checkpoint.folder / TENSORS), model, optimizer)
        steps = [StepStats(**step) for step in state["steps"]]
        start = adapter_copy(model)
        if steps:
            tensors = load_file(checkpoint.folder / EPOCH_START)
            for (name, _), tensor in zip(model.named_trainable(), start, strict=True):
                tensor.copy_(same_shape(tensors[name], tensor))
        progress = Progress(int(state["epoch"]), steps, int(state["samples"]), start)
        if not checkpoint.folder.name.endswith(checkpoint_name(progress.epochs, len(steps))):
            raise ValueError(f"it is the state of {checkpoint_name(progress.epochs, len(steps))}")
        return progress, LossScale(**state["loss_scale"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"The training state in {checkpoint.folder} is damaged ({error}): resume from another checkpoint."
        ) from error


def load_optimizer(tensors: dict[str, torch.Tensor], model: FlowModel, optimizer: torch.optim.AdamW) -> None:
    """AdamW's state from optimizer_tensors. Raises KeyError or ValueError where it does not fit."""
    for name, parameter in model.named_trainable() if tensors else ():  # none yet where no step was applied
        moments = {key: same_shape(tensors[f"{key}:{name}"], parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": tensors[f"step:{name}"]} | {
            key: value.to(parameter.device) for key, value in moments.items()
        }


def same_shape(tensor: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    if tensor.shape != wanted.shape:
        raise ValueError(f"a tensor has the shape {tuple(tensor.shape)} instead of {tuple(wanted.shape)}")
    return tensor
