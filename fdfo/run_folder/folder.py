"""The run folder: creates it, opens it again, and claims it for one process."""

import fcntl
import os
import re
import shutil
import time
from pathlib import Path

from fdfo.config.errors import UserError
from fdfo.config.options import to_json
from fdfo.config.train_options import TrainConfig
from fdfo.run_folder.find_checkpoint import CONFIG, all_checkpoints, epochs_and_steps
from fdfo.run_folder.log import read_intact_log
from fdfo.storage.atomic_files import atomic_folder, json_hash, write_text

SHEET_NAME = re.compile(r"(?:epoch|pairs)-(\d{7,})\.jpg")


def check_writable(folder: Path) -> None:
    """Raise UserError if nothing could be written to a folder, which need not exist yet. Writes nothing."""
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"No run folder can be made in {folder}: {parent} is not a folder you can write to; give another --runs-dir."
        )


def create_run_folder(config: TrainConfig) -> Path:
    """Create runs/NNNNN-name with the next free number, and config.json in it. Raises UserError if it cannot be written."""
    reward = "custom" if config.reward_specs else config.reward_preset
    name = config.run_name or f"{reward}-cfg_{config.sample.guidance_scale}".replace(".", "p")
    try:
        config.runs_dir.mkdir(parents=True, exist_ok=True)
        taken = [int(p.name[:5]) for p in config.runs_dir.iterdir() if re.match(r"\d{5}-", p.name)]
        run = config.runs_dir / f"{max(taken, default=-1) + 1:05d}-{name}"
        with atomic_folder(run) as folder:
            (folder / CONFIG).write_text(to_json(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"No run folder can be made in {config.runs_dir} ({error.strerror}): give another --runs-dir.") from error
    return run


def reopen_run_folder(run: Path, config: TrainConfig, reached: tuple[int, int]) -> None:
    """Write the resumed run's config.json, and set aside the checkpoints and sheets after the point where it continues.

    reached: whole epochs and further optimizer steps. Raises UserError.
    """
    try:
        write_text(run / CONFIG, to_json(config))
        for partial in run.glob("checkpoints/.epoch-*.partial"):  # of a process that was killed while it wrote or deleted one
            shutil.rmtree(partial)
        later = [folder for folder in all_checkpoints(run) if epochs_and_steps(folder) > reached]
        later += [sheet for sheet, epoch in sheets_of(run) if epoch > max(0, reached[0])]  # epoch 0 has no checkpoint
        for path in later:
            path.rename(path.with_name(f"abandoned-{time.strftime('%Y%m%d-%H%M%S')}-{path.name}"))
    except OSError as error:
        raise UserError(f"{run} cannot be written ({error.strerror}): resume from a copy that can.") from error


def sheets_of(run: Path) -> list[tuple[Path, int]]:
    """Return the sheets of samples and of pairs in a run folder, each with its epoch."""
    found = {path: SHEET_NAME.fullmatch(path.name) for path in (run / "samples").glob("*.jpg")}
    return [(path, int(match[1])) for path, match in found.items() if match]


def claim(run: Path) -> None:
    """Keep other processes from training in a run folder until this one ends. Raises UserError if one does already."""
    try:
        descriptor = os.open(run / ".claim", os.O_RDWR | os.O_CREAT)  # stays open: closing it would end the claim
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"{run} cannot be claimed ({error.strerror}): another process may be training in it, end that one."
        ) from error


def evaluated_epochs(run: Path) -> list[int]:
    """Return the epochs at which the log of a run to resume has an evaluation."""
    return [line["epoch"] for line in read_intact_log(run) if line["kind"] == "eval"]


def check_same_prompts(run: Path, held_out: list[str]) -> None:
    """Raise UserError if the run was evaluated on other prompts, since evaluations are compared prompt by prompt."""
    now = json_hash(held_out)
    for line in read_intact_log(run):
        if line["kind"] == "eval" and line["prompt_sum"] != now:
            raise UserError(
                f"The held-out prompts are not those on which {run} was evaluated after epoch {line['epoch']}: restore the prompt "
                "file, or start a new run."
            )
