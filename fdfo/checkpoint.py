"""Checkpoints: a PEFT adapter, and beside it the state that resumes a run exactly. Written whole or not at all."""

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fdfo.config import TrainConfig, UserError, config_from_json
from fdfo.hub import ADAPTER, check_adapter_files, download_folder
from fdfo.model import FlowModel
from fdfo.update import LossScale

CFG_IN_NAME = re.compile(r"(no-cfg|cfg[-_](\d+)[.p](\d+))(?=[/_-]|$)")
STATE, TENSORS = "training_state.json", "training_state.safetensors"
FIXED_ON_RESUME = (
    "seed", "vlm_model_name", "lora_rank", "lora_alpha", "pretrained_model", "prompt_set", "total_pairs_per_epoch", "gradient_steps_per_epoch",
    "sample", "churn", "reward_preset", "reward_specs", "precision",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """An adapter folder, and the run it belongs to where it lies in one."""

    folder: Path
    run: Path | None  # the run folder, with a config.json

    @property
    def run_name(self) -> str:
        return self.run.name if self.run is not None else self.folder.resolve().parent.name

    @property
    def label(self) -> str:
        return f"{self.run_name}/{self.folder.name}"

    @property
    def resumable(self) -> bool:
        return self.run is not None and (self.folder / STATE).is_file()


def find_checkpoint(text: str) -> Checkpoint:
    """The checkpoint that a user names: a checkpoint folder, a run folder (its latest one), or a folder on the hub.

    Hub names are https://huggingface.co/OWNER/NAME/tree/REVISION/FOLDER and hf:OWNER/NAME/FOLDER; that folder alone is
    downloaded. Raises UserError when there is no adapter.
    """
    hub = "://" in text or text.startswith("hf:")
    if hub:
        folder = download_folder(text)
    else:
        folder = Path(text)
        if (folder / "checkpoints").is_dir():
            folder = run_checkpoints(folder)[-1]
    check_adapter_files(folder, text)
    parent = folder.resolve().parent
    in_run = not hub and parent.name == "checkpoints" and (parent.parent / "config.json").is_file()
    return Checkpoint(folder, parent.parent if in_run else None)


def run_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first. Raises UserError when there is none."""
    complete = sorted(p for p in (run / "checkpoints").glob("epoch-*") if (p / STATE).is_file())
    if not complete:
        raise UserError(f"{run} holds no complete checkpoint yet: start the run anew, or give another folder.")
    return complete


def saved_config(checkpoint: Checkpoint) -> TrainConfig | None:
    """The config of the run that a checkpoint belongs to."""
    if checkpoint.run is None:
        return None
    path = checkpoint.run / "config.json"
    try:
        return config_from_json(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a run's config.json: restore the file or start a new run.") from error


def trained_guidance(checkpoint: Checkpoint) -> float | None:
    """The guidance an adapter was trained with, by its run's config, or as published folders name it: ...-no-cfg, ...-cfg-4.5."""
    saved = saved_config(checkpoint)
    if saved is not None:
        return saved.sample.guidance_scale
    if not (match := CFG_IN_NAME.search(checkpoint.label)):
        return None
    return 1.0 if match[1] == "no-cfg" else float(f"{match[2]}.{match[3]}")


def guidance_warning(checkpoint: Checkpoint, trained: float | None, used: float) -> str | None:
    """METHOD.md 5: an adapter trained with guidance w is sampled with w."""
    if trained is None or trained == used:
        return None
    return (
        f"warning: {checkpoint.label} was trained with guidance {trained:g} and is drawn with {used:g}: "
        f"--guidance-scale {trained:g} suits it"
    )


def check_resume(config: TrainConfig, saved: TrainConfig) -> None:
    """Raises UserError when a resumed run would no longer be the run it continues."""
    for name in FIXED_ON_RESUME:
        before, now = getattr(saved, name), getattr(config, name)
        if name == "sample":  # the micro-batch may change, the samples may not
            before, now = (before.num_solver_steps, before.guidance_scale, before.resolution), (
                now.num_solver_steps, now.guidance_scale, now.resolution,
            )  # fmt: skip
        if before != now:
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag} was {before} in the run to resume and is {now} now: leave it as it was, or start a new run."
            )


def save_checkpoint(
    run: Path, epoch: int, model: FlowModel, optimizer: torch.optim.AdamW, scale: LossScale, samples: int
) -> Path:
    """Writes checkpoints/epoch-NNNNNNN after `epoch` whole epochs: adapter, optimizer, loss scale, counters."""
    final = run / "checkpoints" / f"epoch-{epoch:07d}"
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        config = model.peft.peft_config["default"]
        config.base_model_name_or_path = model.name
        config.save_pretrained(str(partial))
        save_file(model.adapter_state(), partial / ADAPTER, metadata={"format": "pt"})
        save_file(optimizer_tensors(model, optimizer), partial / TENSORS)
        counters = {"epoch": epoch, "samples": samples, "loss_scale": dataclasses.asdict(scale)}
        (partial / STATE).write_text(json.dumps(counters, indent=2) + "\n")
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
    except (OSError, SafetensorError) as error:
        raise UserError(f"The checkpoint {final} cannot be written ({error}): make room or give another --runs-dir.") from error
    return final


def optimizer_tensors(model: FlowModel, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """AdamW's state under the parameters' names."""
    tensors = {}
    for name, parameter in model.named_trainable():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}:{name}"] = value.detach().cpu().contiguous()
    return tensors


def load_training_state(checkpoint: Checkpoint, model: FlowModel, optimizer: torch.optim.AdamW) -> tuple[int, LossScale, int]:
    """Restores the optimizer; returns the number of epochs done, the loss scale and the samples seen. Raises UserError."""
    try:
        counters = json.loads((checkpoint.folder / STATE).read_text())
        tensors = load_file(checkpoint.folder / TENSORS)
        for name, parameter in model.named_trainable() if tensors else ():  # none yet where no step was applied
            state = {key: tensors[f"{key}:{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            if state["exp_avg"].shape != parameter.shape:
                raise ValueError(f"{name} has another shape")
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
            }
        return int(counters["epoch"]), LossScale(**counters["loss_scale"]), int(counters["samples"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"The training state in {checkpoint.folder} is damaged ({error}): resume from another checkpoint."
        ) from error
