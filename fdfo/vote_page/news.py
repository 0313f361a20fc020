"""What the page tells besides pairs: what the trainer does now, and the held-out evaluations so far."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from fdfo.config.errors import UserError
from fdfo.storage.atomic_files import write_text

EVALUATIONS = "held-out.json"


@dataclass
class Stage:
    """A stage of the trainer's work: so many of the total are done, since a time (time.monotonic)."""

    name: str
    done: int
    total: int
    unit: str
    since: float
    last: float  # time of the newest progress


class News:
    """Keeps the evaluations beside the images of the votes, so that a resumed run shows the curve from its start."""

    def __init__(self, folder: Path):
        self.path, self.stage = folder / EVALUATIONS, Stage("starting", 0, 0, "", time.monotonic(), time.monotonic())
        self.durations: dict[str, float] = {}  # seconds that each stage took the last time
        self.evaluations: list[dict] = []
        self.prompts: list[str] = []
        if self.path.exists():
            content = json.loads(self.path.read_text(encoding="utf-8"))
            self.evaluations, self.prompts = content["evaluations"], content["prompts"]

    def tell(self, name: str, done: int, total: int, unit: str) -> None:
        """Note what the trainer does now."""
        now, before = time.monotonic(), self.stage
        if name != before.name or done < before.done:
            self.durations[before.name] = now - before.since
            self.stage = Stage(name, done, total, unit, now, now)
        else:
            self.stage = Stage(name, done, total, unit, before.since, now)

    def seconds_left(self) -> float | None:
        """Return how long the stage will still take: at its own speed, or at that of the last time. None if nobody knows."""
        stage, passed = self.stage, time.monotonic() - self.stage.since
        if 0 < stage.done < stage.total:
            return max(0.0, (stage.last - stage.since) * stage.total / stage.done - passed)
        last = self.durations.get(stage.name)
        return None if last is None else max(0.0, last - passed)

    def add_evaluation(self, epoch: int, scores: dict[str, float], prompts: list[str]) -> None:
        """Add the mean scores after so many epochs. Raises UserError if they cannot be written."""
        self.forget_after(epoch - 1)
        self.evaluations.append({"epoch": epoch, "scores": scores})
        self.prompts = prompts
        content = {"prompts": prompts, "evaluations": self.evaluations}
        try:
            write_text(self.path, json.dumps(content))
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}): make room, then resume.") from error

    def forget_after(self, epoch: int) -> None:
        """Forget evaluations after more epochs than these, which a resumed run does again."""
        self.evaluations = [found for found in self.evaluations if found["epoch"] <= epoch]

    def state(self) -> dict:
        stage = self.stage
        return {
            "stage": {"name": stage.name, "done": stage.done, "total": stage.total, "unit": stage.unit},
            "seconds_left": self.seconds_left(),
            "evaluations": self.evaluations,
            "heldout_prompts": self.prompts,
        }
