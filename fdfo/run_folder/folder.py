"""The run folder: creates it, opens it again, and claims it for one process."""

import contextlib
import fcntl
import itertools
import os
import re
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from fdfo.config.errors import UserError
from fdfo.config.options import flag_of, to_json
from fdfo.config.train_options import TrainConfig
from fdfo.distributed.job import Job
from fdfo.run_folder.find_checkpoint import CONFIG, all_checkpoints, epochs_and_steps, read_config
from fdfo.run_folder.log import LOG, damaged_line, evaluation_due, read_intact_log
from fdfo.run_folder.save_checkpoint import TrainingState
from fdfo.run_folder.start import Start
from fdfo.storage.atomic_files import atomic_folder, write_text
from fdfo.storage.prompts import prompts_hash

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


def open_folder(job: Job, config: TrainConfig, start: Start, reached: tuple[int, int], changed: dict) -> Path:
    """Create the run folder, or open the one to continue in; print which, and what has changed.

    reached: whole epochs and further optimizer steps.
    """
    if start.run is None:
        if start.checkpoint is not None:
            job.print(f"{start.checkpoint.adapter} has an adapter but no training state: a new run starts from it at epoch 0")
        folder = job.on_main(lambda: create_run_folder(config))
        job.on_main(lambda: claim(folder))
        return folder
    job.on_main(lambda: claim(start.run))
    job.on_main(lambda: reopen_run_folder(start.run, config, (-1, 0) if start.again else reached, bool(changed)))
    if start.again:
        job.print(f"{start.run} has no intact checkpoint: beginning again in it")
    else:
        steps = f" and {reached[1]} optimizer steps of the next" if reached[1] else ""
        job.print(f"resuming {start.run} after epoch {reached[0]}{steps}")
    for name, (before, now) in changed.items():
        job.print(f"changed from here on: {flag_of(name)} is {now}, it was {before}")
    return start.run


def create_run_folder(config: TrainConfig) -> Path:
    """Create runs/NNNNN-name with the next free number, and config.json in it. Raises UserError if it cannot be written.

    Processes that start together reserve their numbers by the temporary folder, whose name has the number alone.
    """
    reward = "custom" if config.reward_specs else config.reward_preset
    name = config.run_name or f"{reward}-cfg_{config.sample.guidance_scale}".replace(".", "p")
    try:
        config.runs_dir.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(max(run_numbers(config.runs_dir), default=-1) + 1):
            run = config.runs_dir / f"{number:05d}-{name}"
            with contextlib.suppress(FileExistsError), atomic_folder(run, config.runs_dir / f".{number:05d}.partial") as folder:
                if number in run_numbers(config.runs_dir):  # taken since they were counted
                    raise FileExistsError
                (folder / CONFIG).write_text(to_json(config), encoding="utf-8")
                return run
    except OSError as error:
        raise UserError(f"No run folder can be made in {config.runs_dir} ({error.strerror}): give another --runs-dir.") from error


def run_numbers(runs_dir: Path) -> set[int]:
    """Return the numbers of the run folders there."""
    return {int(path.name[:5]) for path in runs_dir.iterdir() if re.match(r"\d{5}-", path.name)}


def reopen_run_folder(run: Path, config: TrainConfig, reached: tuple[int, int], changed: bool) -> None:
    """Write the resumed run's config.json, and set aside what comes after the point where it continues.

    reached: whole epochs and further optimizer steps; (-1, 0) to begin again, which keeps a copy of the log. changed: settings
    that affect results have changed, so that the former config.json is kept. Raises UserError.
    """
    try:
        for partial in run.glob("checkpoints/.epoch-*.partial"):  # of a process that was killed while it wrote or deleted one
            shutil.rmtree(partial)
        later = [folder for folder in all_checkpoints(run) if epochs_and_steps(folder) > reached]
        later += [sheet for sheet, epoch in sheets_of(run) if epoch > max(0, reached[0])]  # epoch 0 has no checkpoint
        now = time.strftime("%Y%m%d-%H%M%S")
        for path in later:
            path.rename(path.with_name(f"abandoned-{now}-{path.name}"))
        if reached < (0, 0) and (run / LOG).exists():
            shutil.copyfile(run / LOG, run / f"abandoned-{now}-{LOG}")
        if changed:
            shutil.copyfile(run / CONFIG, run / f"config-until-{now}.json")
        write_text(run / CONFIG, to_json(config))
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


def check_log(
    run: Path, config: TrainConfig, state: TrainingState | None, held_out: list[str], names: Collection[str]
) -> set[int]:
    """Return the epochs after which the log of a run to resume has an evaluation.

    Raises UserError unless it has every epoch and evaluation up to the state, and evaluations by these scorers on these prompts. An
    evaluation need not be there if --eval-every has changed so that it was not due. state: None to begin again.
    """
    lines, before, now = read_intact_log(run), read_config(run), prompts_hash(held_out)
    epochs, evaluated = (0, []) if state is None else (state.epochs, state.evaluated)
    due = [epoch for epoch in evaluated if evaluation_due(config, epoch) and evaluation_due(before, epoch)]
    wanted = [("epoch", epoch) for epoch in range(1, epochs + 1)] + [("eval", epoch) for epoch in due]
    there = {(line["kind"], line["epoch"]) for line in lines}
    for kind, epoch in wanted:
        if (kind, epoch) not in there:
            raise UserError(
                f"{run / LOG} has no line of kind {kind} for epoch {epoch}, though the checkpoint comes after it: restore the file "
                "from a copy, then resume."
            )
    for number, line in enumerate(lines, start=1):
        if line["kind"] == "eval" and line["prompt_sum"] != now:
            raise UserError(
                f"The held-out prompts are not those on which {run} was evaluated after epoch {line['epoch']}: restore the prompt "
                "file, or start a new run."
            )
        if line["kind"] == "eval" and set(line["scores"]) != set(names):
            raise damaged_line(run, number, f"its scores are not those of {', '.join(names)}")
    return {epoch for kind, epoch in there if kind == "eval"}
