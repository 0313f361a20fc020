"""The run folder, its log, and the clock of the stages."""

import contextlib
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from tqdm import tqdm

from fdfo.checkpoint import all_checkpoints, position
from fdfo.config import TrainConfig, UserError
from fdfo.config_file import config_to_dict, config_to_json
from fdfo.distributed import Job
from fdfo.manifest import whole_folder, write_whole

T = TypeVar("T")
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


class RunLog:
    """training_log.jsonl, one object a line, of kind start, step, epoch or eval; and Weights & Biases where asked for."""

    def __init__(self, run: Path, config: TrainConfig, epochs_done: int, steps_done: int, main: bool):
        """Lines of what a resumed run will do again are taken out first. Only the main process writes."""
        self.path, self.main, self.wandb = run / "training_log.jsonl", main, None
        self.gradient_norms: list[float] = []  # of the optimizer steps so far
        self.evaluations: list[dict] = []  # the lines of kind eval so far, which the main process alone knows
        if not main:
            return
        if self.path.exists():
            lines = [line for line in read_log(self.path) if done_before(line, epochs_done, steps_done, config)]
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in lines))
            self.evaluations = [line for line in lines if line["kind"] == "eval"]
            norms = [line.get("grad_norm") for line in lines if line["kind"] == "step"]
            self.gradient_norms = [norm for norm in norms if norm is not None]  # null stands for one that was not finite
        if config.log_wandb:
            import wandb

            mark = run / "wandb_id.txt"  # a resumed run goes on in its own W&B run
            if not mark.exists():
                mark.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
            self.wandb = wandb.init(
                project="fdfo", name=run.name, dir=run, config=config_to_dict(config), resume="allow", id=mark.read_text().strip()
            )

    def write(self, kind: str, epoch: int, **values: object) -> None:
        """Appends one object. epoch counts whole epochs done once this line's epoch is over."""
        if not self.main:
            return
        line = {"kind": kind, "epoch": epoch} | {name: as_json(value) for name, value in values.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())  # no checkpoint outlives the lines before it
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}): make room, then resume.") from error
        if kind == "eval":
            self.evaluations.append(line)
            values = {name: value for name, value in values.items() if name not in ("scores", "prompt_sum")}  # no use in W&B
        if self.wandb is not None:
            self.wandb.log({f"{kind}/{name}": value for name, value in values.items()} | {"epoch": epoch})

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()


def read_log(path: Path) -> list[dict]:
    """The lines of a run's log, but for one that a killed process has not ended. Raises UserError for a damaged one."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), start=1):
        try:
            line = json.loads(text)
            check_line(line)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if not text.endswith("\n"):
                break
            raise UserError(f"Line {number} of {path} is damaged: take that line out, then resume.") from error
        lines.append(line)
    return lines


def check_line(line: dict) -> None:
    """Raises one of several errors unless this is an object whose numbers a resumed run can rely on."""
    texts, numbers = [line["kind"]], [line["epoch"], line.get("step", 0), line.get("grad_norm") or 0]
    if line["kind"] == "eval":
        texts.append(line["prompt_sum"])
        numbers += [value or 0 for values in line["scores"].values() for value in values]
    if not (all(isinstance(text, str) for text in texts) and all(isinstance(number, int | float) for number in numbers)):
        raise ValueError("not a line of this log")


def evaluation_due(config: TrainConfig, epochs: int) -> bool:
    """Whether a run evaluates after that many epochs, where it has held-out prompts."""
    return epochs % config.eval_every == 0 or epochs == config.num_epochs


def done_before(line: dict, epochs: int, steps: int, config: TrainConfig) -> bool:
    """Whether a line of the log is of these whole epochs, or of the steps after them, and has a place in the run as it is now."""
    if line["kind"] == "eval" and not evaluation_due(config, line["epoch"]):
        return False
    step_done = line["kind"] == "step" and line["epoch"] == epochs + 1 and line.get("step", steps + 1) <= steps
    return line["epoch"] <= epochs or step_done


def as_json(value: object) -> object:
    """The value with null for numbers that are not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class StageClock:
    """Seconds spent in each named stage since the last reading."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def each(self, name: str, items: Iterator[T]) -> Iterator[T]:
        """The items, with the time that it takes to get each of them."""
        while True:
            with self.stage(name):
                item = next(items, None)
            if item is None:
                return
            yield item

    def take(self, name: str) -> float:
        """Seconds of one stage since the last reading, rounded to milliseconds, which the next reading leaves out."""
        return round(self.seconds.pop(name, 0.0), 3)

    def read(self) -> dict[str, float]:
        """Seconds by stage, rounded to milliseconds; the clock starts again from 0."""
        seconds, self.seconds = self.seconds, {}
        return {name: round(value, 3) for name, value in seconds.items()}


def progress_bar(job: Job, total: int, what: str, unit: str = "picture", leave: bool = True) -> tqdm:
    """Rank 0's share of the work with the time left; nothing where the output is no terminal, or for a total of 0."""
    return tqdm(total=total, desc=what, unit=unit, leave=leave, disable=None if job.is_main and total else True)


def versions() -> dict[str, str]:
    """Versions of the libraries that decide about numbers."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}


def memory_gib(device: torch.device) -> float:
    """Memory in use now: allocated on the GPU, or resident on the CPU, GiB."""
    if device.type == "cuda":
        return round(torch.cuda.memory_allocated(device) / 2**30, 4)
    return round(psutil.Process().memory_info().rss / 2**30, 4)


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory in use so far: allocated on the GPU, or resident on the CPU, GiB."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
