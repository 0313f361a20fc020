"""Decides how a run starts: fresh, from an adapter, or in the folder of a run that goes on."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fdfo.config.errors import UserError
from fdfo.config.options import deciding_settings, flag_of
from fdfo.config.train_options import TrainConfig
from fdfo.run_folder.find_checkpoint import STATE, Checkpoint, find_checkpoint, newest_intact, read_config
from fdfo.storage.adapters import read_lora_adapter

AUTO = "auto"


@dataclass(frozen=True)
class Start:
    """How a run starts; decided once. A fresh run has neither field, one from an adapter has a checkpoint alone.

    A resumed run has both. A run that begins again in its own folder, since it has no intact checkpoint, has a folder alone.
    """

    checkpoint: Checkpoint | None = None  # whose adapter the run starts with
    run: Path | None = None  # run folder to continue in

    @property
    def resumed(self) -> bool:
        return self.checkpoint is not None and self.run is not None

    @property
    def again(self) -> bool:
        return self.checkpoint is None and self.run is not None


FRESH = Start()


def find_start(text: str) -> Start:
    """Decide how a run starts from the checkpoint that a user names. Raises UserError."""
    checkpoint = find_checkpoint(text)
    if checkpoint.run is None and checkpoint.file is None and (checkpoint.folder / STATE).is_file():
        raise UserError(
            f"{checkpoint.folder} has a training state, but no config.json two folders up: copy the whole run folder, or leave the "
            "training_state files out to start a new run from the adapter."
        )
    return Start(checkpoint, checkpoint.run if checkpoint.resumable else None)


def with_lora_of(config: TrainConfig, start: Start, given: Collection[str]) -> TrainConfig:
    """Return the settings with rank and alpha of the adapter that a new run starts from. given: those that the user names.

    Raises UserError if a given one disagrees.
    """
    if start.checkpoint is None or start.resumed:
        return config
    lora = read_lora_adapter(start.checkpoint.adapter).config
    own = {"lora_rank": lora.r, "lora_alpha": lora.lora_alpha}
    for name in given:
        if getattr(config, name) != own[name]:
            raise UserError(
                f"{flag_of(name)} is {getattr(config, name)}, that of {start.checkpoint.label} is {own[name]}: leave it out."
            )
    return dataclasses.replace(config, **own)


def find_auto_start(config: TrainConfig) -> Start:
    """Find the run that `auto` resumes; print the reason if there is none.

    That run is the folder in --runs-dir with the highest number whose settings are the config's, but for those that do not affect
    results.
    """
    wanted, newest_other = deciding_settings(config), None
    for folder in sorted(config.runs_dir.glob("[0-9]" * 5 + "-*"), reverse=True):
        try:
            saved = deciding_settings(read_config(folder))
        except UserError as error:
            print(f"warning: {folder.name} is skipped: {error}", flush=True)
            continue
        differing = [name for name, value in saved.items() if value != wanted[name]]
        if not differing:
            newest = newest_intact(folder)
            return Start(None if newest is None else Checkpoint(newest, folder), folder)
        newest_other = newest_other or f"{folder.name} differs in {', '.join(differing)}"
    if newest_other is not None:
        print(f"no run in {config.runs_dir} has these settings, so a new one begins ({newest_other})", flush=True)
    return FRESH
