"""The log of a run: training_log.jsonl, and Weights & Biases where asked for."""

import json
import math
import os
import secrets
from pathlib import Path

from fdfo.config import TrainConfig, UserError
from fdfo.config_file import config_to_dict
from fdfo.manifest import write_whole


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
            name, identity = run.name, mark.read_text().strip()
            try:
                self.wandb = wandb.init(
                    project="fdfo", name=name, dir=run, config=config_to_dict(config), resume="allow", id=identity
                )
            except wandb.errors.Error as error:
                raise UserError(
                    f"Weights & Biases cannot be used ({str(error)[:200]}): run `wandb login`, set WANDB_MODE=offline, or leave "
                    "--log-wandb out."
                ) from error

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
