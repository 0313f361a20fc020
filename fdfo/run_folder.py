"""The run folder: made, opened again, claimed by one process."""

import fcntl
import os
import re
import shutil
import time
from pathlib import Path

from fdfo.checkpoint import all_checkpoints, position
from fdfo.config import TrainConfig, UserError
from fdfo.config_file import config_to_json
from fdfo.manifest import whole_folder, write_whole

SHEET_NAME = re.compile(r"(?:epoch|pairs)-(\d{7,})\.jpg")


def check_writable(runs_dir: Path) -> None:
    """Raises UserError when no run folder could be made there. Writes nothing."""
    parent = runs_dir.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"No run folder can be made in {runs_dir}: {parent} is not a folder you can write to; give another --runs-dir."
        )


def create_run_folder(config: TrainConfig) -> Path:
    """runs/NNNNN-name with the next free number, and config.json in it. Raises UserError when it cannot be written."""
    name = config.run_name or f"{default_reward_name(config)}-cfg_{config.sample.guidance_scale}".replace(".", "p")
    try:
        config.runs_dir.mkdir(parents=True, exist_ok=True)
        taken = [int(p.name[:5]) for p in config.runs_dir.iterdir() if re.match(r"\d{5}-", p.name)]
        run = config.runs_dir / f"{max(taken, default=-1) + 1:05d}-{name}"
        with whole_folder(run) as folder:
            (folder / "config.json").write_text(config_to_json(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"No run folder can be made in {config.runs_dir} ({error.strerror}): give another --runs-dir.") from error
    return run


def reopen_run_folder(run: Path, config: TrainConfig, reached: tuple[int, int]) -> None:
    """Makes config.json say what the resumed run does, and sets checkpoints and sheets aside that lie behind the position it goes
    on from."""
    try:
        write_whole(run / "config.json", config_to_json(config))
        for partial in run.glob("checkpoints/.epoch-*.partial"):  # of a process that was killed while it wrote or deleted one
            shutil.rmtree(partial)
        later = [folder for folder in all_checkpoints(run) if position(folder) > reached]
        later += [sheet for sheet, epoch in sheets_of(run) if epoch > max(0, reached[0])]  # epoch 0 has no checkpoint
        for path in later:
            path.rename(path.with_name(f"abandoned-{time.strftime('%Y%m%d-%H%M%S')}-{path.name}"))
    except OSError as error:
        raise UserError(f"{run} cannot be written ({error.strerror}): resume from a copy that can.") from error


def sheets_of(run: Path) -> list[tuple[Path, int]]:
    """The sheets of samples and of pairs in a run folder, each with its epoch."""
    found = {path: SHEET_NAME.fullmatch(path.name) for path in (run / "samples").glob("*.jpg")}
    return [(path, int(match[1])) for path, match in found.items() if match]


def claim(run: Path) -> None:
    """Lets no other process train in a run folder until this one has ended, however it ends. Raises UserError if one does."""
    try:
        descriptor = os.open(run / ".claim", os.O_RDWR | os.O_CREAT)  # never closed, since closing it would end the claim
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"{run} cannot be claimed ({error.strerror}): another process may be training in it, end that one."
        ) from error


def default_reward_name(config: TrainConfig) -> str:
    return "custom" if config.reward_specs else config.reward_preset
