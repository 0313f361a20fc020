"""Finds the checkpoint that a user names, and checks that it is intact."""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fdfo.config.command_line import check_train_config
from fdfo.config.errors import UserError
from fdfo.config.options import check_options, from_json
from fdfo.config.train_options import TrainConfig
from fdfo.storage.adapters import read_adapter_config
from fdfo.storage.atomic_files import read_sealed
from fdfo.storage.foreign_lora import read_lora_file
from fdfo.storage.hub import ADAPTER, ADAPTER_CONFIG, LORA_FILE, LORA_SUFFIX, check_adapter_files, download_folder, hub_place

BEST = "best"
CONFIG = "config.json"
CFG_IN_NAME = re.compile(r"(no-cfg|cfg[-_](\d+)[.p](\d+))(?=[/_-]|$)")
CHECKPOINT_NAME = re.compile(r"epoch-(\d{7,})(?:-step-(\d{7,}))?")
STATE, TENSORS, EPOCH_START = "training_state.json", "training_state.safetensors", "epoch_start.safetensors"
CARD = "README.md"  # the model card, which is what the hub shows of a folder


@dataclass(frozen=True)
class Checkpoint:
    """An adapter folder, and its run folder if it lies in one."""

    folder: Path
    run: Path | None  # the run folder, with a config.json
    published: PurePosixPath | None = None  # OWNER/NAME/FOLDER on the hub, if it comes from there
    file: str | None = None  # the LoRA file in the folder, if it is one of another program and no PEFT adapter

    @property
    def adapter(self) -> Path:
        """What FlowModel.load_adapter reads."""
        return self.folder if self.file is None else self.folder / self.file

    @property
    def run_name(self) -> str:
        return self.run.name if self.run is not None else (self.published or self.adapter.resolve()).parent.name

    @property
    def label(self) -> str:
        return f"{self.run_name}/{(self.published or self.adapter).name}"

    @property
    def resumable(self) -> bool:
        return self.run is not None and (self.folder / STATE).is_file()


def find_checkpoint(text: str) -> Checkpoint:
    """Find the checkpoint that a user names: a checkpoint folder, a run folder (its newest intact one), or a folder on the hub.

    A LoRA file of another program, or a folder with one of diffusers' name, is a checkpoint without a run. Of a hub repository only
    that folder's adapter is downloaded. Raises UserError if there is no adapter, or if the training state beside it is damaged.
    """
    place = hub_place(text)
    folder = Path(text) if place is None else download_folder(place)
    if folder.name == BEST and folder.is_symlink():
        folder = folder.resolve()
    if os.path.isdir(folder / "checkpoints"):
        folder = newest_intact(folder)
        if folder is None:
            raise UserError(f"{text} holds no intact checkpoint: start the run anew, or give another folder.")
    if os.path.isfile(folder / STATE):
        read_state(folder)
    elif (file := lora_file_of(folder)) is not None:
        read_lora_file(file)
        return Checkpoint(file.parent, None, None if place is None else place.path, file.name)
    check_adapter_files(folder, text)
    read_adapter_config(folder)
    parent = folder.resolve().parent
    if place is not None:
        return Checkpoint(folder, None, place.path)
    in_run = parent.name == "checkpoints" and (parent.parent / CONFIG).is_file()
    return Checkpoint(folder, parent.parent if in_run else None)


def lora_file_of(path: Path) -> Path | None:
    """Return the LoRA file of another program that a path means: the path itself, or the one in a folder without a PEFT adapter."""
    if path.suffix == LORA_SUFFIX and os.path.isfile(path):
        return path
    file = path / LORA_FILE
    return file if os.path.isfile(file) and not os.path.exists(path / ADAPTER_CONFIG) else None


def read_state(folder: Path) -> dict:
    """Read the training state of a checkpoint folder. Raises UserError unless all of the folder is as it was written."""
    return read_sealed(folder, STATE, (ADAPTER_CONFIG, ADAPTER, LORA_FILE, CARD, TENSORS, EPOCH_START))


def checkpoint_name(epochs: int, steps: int) -> str:
    """Return the name of the checkpoint after whole epochs, and optimizer steps of the next one if there are any."""
    return f"epoch-{epochs:07d}" + (f"-step-{steps:07d}" if steps else "")


def epochs_and_steps(folder: Path) -> tuple[int, int]:
    """Return the whole epochs and further optimizer steps in a checkpoint folder's name."""
    epochs, steps = CHECKPOINT_NAME.fullmatch(folder.name).groups()
    return int(epochs), int(steps or 0)


def all_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, intact or not."""
    found = [path for path in (run / "checkpoints").glob("epoch-*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(found, key=epochs_and_steps)


def run_checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints after whole epochs, oldest first; print which are skipped. Raises UserError if there is none."""
    whole = [folder for folder in all_checkpoints(run) if epochs_and_steps(folder)[1] == 0]
    found = [folder for folder in whole if (folder / STATE).is_file()]
    for folder in whole:
        if folder not in found:
            print(f"warning: {folder.name} is skipped: it has no {STATE}", flush=True)
    if not found:
        raise UserError(f"{run} holds no complete checkpoint yet: start the run anew, or give another folder.")
    return found


def newest_intact(run: Path) -> Path | None:
    """Return the newest checkpoint of a run that is as it was written; print which ones are skipped."""
    for folder in reversed(all_checkpoints(run)):
        try:
            read_state(folder)
        except UserError as error:
            print(f"warning: {folder.name} is skipped: {error}", flush=True)
        else:
            return folder
    return None


def read_config(run: Path) -> TrainConfig:
    """Read a run's config.json, and check every value. Raises UserError."""
    path = run / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a run's config.json ({error}): restore the file or start a new run.") from error
    config = from_json(TrainConfig, text, str(path))
    check_options(config)
    check_train_config(config)
    return config


def saved_config(checkpoint: Checkpoint | None) -> TrainConfig | None:
    """Return the config of the run that a checkpoint belongs to, if it is known. Raises UserError."""
    return None if checkpoint is None or checkpoint.run is None else read_config(checkpoint.run)


def trained_guidance(checkpoint: Checkpoint | None) -> float | None:
    """Return the guidance that an adapter was trained with, if it is known.

    It stands in the run's config, or in the name of a published folder: ...-no-cfg, ...-cfg-4.5.
    """
    saved = saved_config(checkpoint)
    if saved is not None:
        return saved.sample.guidance_scale
    if checkpoint is None or not (match := CFG_IN_NAME.search(checkpoint.label)):
        return None
    return 1.0 if match[1] == "no-cfg" else float(f"{match[2]}.{match[3]}")


def guidance_warning(checkpoint: Checkpoint, used: float, flag: str = "--guidance-scale") -> str | None:
    """Warn if an adapter is not sampled with the guidance it was trained with (docs/method.md 5). flag: the one that sets it."""
    trained = trained_guidance(checkpoint)
    if trained is None or trained == used:
        return None
    return (
        f"warning: {checkpoint.label} was trained with guidance {trained:g} and is sampled with {used:g}: "
        f"{flag} {trained:g} suits it"
    )
