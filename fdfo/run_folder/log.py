"""The log of a run: training_log.jsonl, and Weights & Biases if asked for."""

import json
import math
import os
import secrets
from pathlib import Path
from typing import NotRequired

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from fdfo.config.errors import UserError
from fdfo.config.options import to_dict
from fdfo.config.train_options import TrainConfig
from fdfo.storage.atomic_files import write_text

LOG = "training_log.jsonl"


class RunLog:
    """training_log.jsonl, one object per line, of kind start, step, epoch or eval; and Weights & Biases if asked for."""

    def __init__(self, run: Path, config: TrainConfig, reached: tuple[int, int], main: bool):
        """Remove the lines of what a resumed run will do again. reached: whole epochs and further steps done.

        Only the main process reads and writes.
        """
        self.run, self.path, self.main, self.wandb = run, run / LOG, main, None
        self.gradient_norms: list[float] = []  # of the optimizer steps so far
        self.evaluations: list[dict] = []  # lines of kind eval so far
        if not main:
            return
        lines = [line for line in read_intact_log(run) if is_kept(line, reached, config)]
        try:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise self.unwritable(error) from error
        self.evaluations = [line for line in lines if line["kind"] == "eval"]
        norms = [line.get("grad_norm") for line in lines if line["kind"] == "step"]
        self.gradient_norms = [norm for norm in norms if norm is not None]  # null: a norm that was not finite
        if config.log_wandb:
            self.wandb = start_wandb(run, config)

    def write(self, kind: str, epoch: int, **values: object) -> None:
        """Append one object. epoch counts the whole epochs done once this line's epoch is over. Raises UserError."""
        if not self.main:
            return
        line = {"kind": kind, "epoch": epoch} | {name: as_json(value) for name, value in values.items()}
        try:
            with self.path.open("r+", encoding="utf-8") as file:  # which does not make it anew in a folder that was removed
                file.seek(0, os.SEEK_END)
                file.write(json.dumps(line, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())  # a checkpoint never lacks the lines before it
        except OSError as error:
            raise self.unwritable(error) from error
        if kind == "eval":
            self.evaluations.append(line)
            values = {name: value for name, value in values.items() if name not in ("scores", "prompt_sum", "changes", "since")}
        if self.wandb is not None:
            self.wandb.log({f"{kind}/{name}": value for name, value in values.items()} | {"epoch": epoch})

    def unwritable(self, error: OSError) -> UserError:
        """Return the error for a log that cannot be written."""
        return UserError(f"{self.path} cannot be written ({error.strerror}): make room, or restore the folder; then resume.")

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()


def start_wandb(run: Path, config: TrainConfig) -> object:
    """Start the run on Weights & Biases, or continue it there. Raises UserError."""
    import wandb

    mark = run / "wandb_id.txt"  # a resumed run continues in its own W&B run
    if not mark.exists():
        mark.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
    identity = mark.read_text().strip()
    try:
        return wandb.init(project="fdfo", name=run.name, dir=run, config=to_dict(config), resume="allow", id=identity)
    except wandb.errors.Error as error:
        raise UserError(
            f"Weights & Biases cannot be used ({str(error)[:200]}): run `wandb login`, set WANDB_MODE=offline, or leave "
            "--log-wandb out."
        ) from error


def read_log(path: Path) -> tuple[list[dict], list[int]]:
    """Return the readable lines of a log, and the numbers of the others, counted from 1. Raises UserError for an unreadable file."""
    try:
        texts = path.read_bytes().decode("utf-8", "replace").split("\n") if path.exists() else []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it readable, or take another run.") from error
    lines, damaged = [], []
    for number, text in enumerate(texts[:-1] if texts and not texts[-1] else texts, start=1):
        try:
            line = json.loads(text, parse_float=_finite, parse_constant=_finite)
            if not isinstance(line["kind"], str) or type(line["epoch"]) is not int or not 0 <= line["epoch"] < 10**9:
                raise ValueError("not a line of a training log")
            lines.append(line)
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged.append(number)
    return lines, damaged


def _finite(text: str) -> float | None:
    """Return a number of the log; None for NaN and infinity."""
    return float(text) if math.isfinite(float(text)) else None


class StepLine(TypedDict):
    """What a resumed run reads of a line of kind step."""

    step: int
    grad_norm: NotRequired[float | None]


class EvaluationLine(TypedDict):
    """What a resumed run reads of a line of kind eval."""

    prompts: int
    prompt_sum: str
    held_out: list[str]
    scores: dict[str, list[float | None]]
    best: int | None
    warnings: list[str]
    seconds: float | None


READ_AGAIN = {"step": TypeAdapter(StepLine), "eval": TypeAdapter(EvaluationLine)}


def read_intact_log(run: Path) -> list[dict]:
    """Return the lines of the log of a run to resume, but for one that a killed process left unfinished.

    Raises UserError, naming the line, for one that is damaged or lacks what a resumed run reads.
    """
    path = run / LOG
    lines, damaged = read_log(path)
    if damaged and (damaged[0] <= len(lines) or path.read_bytes().endswith(b"\n")):
        raise damaged_line(run, damaged[0], "it is no JSON")
    for number, line in enumerate(lines, start=1):
        try:
            if line["kind"] in READ_AGAIN:
                READ_AGAIN[line["kind"]].validate_python(line, strict=True)
        except ValidationError as error:
            raise damaged_line(run, number, f"its {error.errors()[0]['loc'][0]} is wrong or missing") from error
        if line["kind"] == "eval" and any(len(values) != line["prompts"] for values in line["scores"].values()):
            raise damaged_line(run, number, f"not every score has {line['prompts']} values")
    return lines


def damaged_line(run: Path, number: int, reason: str) -> UserError:
    """Return the error for a line that a resumed run cannot rely on."""
    return UserError(f"Line {number} of {run / LOG} is damaged ({reason}): restore the file from a copy, then resume.")


def evaluation_due(config: TrainConfig, epochs: int) -> bool:
    """Return whether a run with held-out prompts evaluates after that many epochs."""
    return epochs % config.eval_every == 0 or epochs == config.num_epochs


def is_kept(line: dict, reached: tuple[int, int], config: TrainConfig) -> bool:
    """Return whether a resumed run keeps a line of its log: one up to the epochs and steps reached."""
    epochs, steps = reached
    if line["kind"] == "eval" and not evaluation_due(config, line["epoch"]):
        return False
    step_done = line["kind"] == "step" and line["epoch"] == epochs + 1 and line.get("step", steps + 1) <= steps
    return line["epoch"] <= epochs or step_done


def as_json(value: object) -> object:
    """Replace numbers that are not finite, which JSON does not know, by null."""
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
