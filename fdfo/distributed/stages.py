"""The stages of a run: timed, watched for progress, shown on the console, and the points where all ranks can stop together."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tqdm import tqdm

from fdfo.distributed.job import Job
from fdfo.distributed.machine import StageClock, progress_bar
from fdfo.distributed.shutdown import Guard, LeaveStage

PLAIN_SECONDS = 60  # between two lines about a stage where the output is no terminal


class StageLine:
    """Shows rank 0's progress in its share of a stage: a progress bar on a terminal, a plain line per minute elsewhere."""

    def __init__(self, job: Job, name: str, place: str, total: int, unit: str):
        """total is 0 for a stage that does not report its progress."""
        self.job, self.name, self.place, self.total, self.unit = job, name, place, total, unit
        self.bar = progress_bar(job, total, place, f" {unit}", leave=False)
        self.start = self.told = time.monotonic()

    def show(self, done: int) -> None:
        now = time.monotonic()
        if not self.bar.disable:
            self.bar.update(done - self.bar.n)
        elif done and self.job.is_main and now - self.told > PLAIN_SECONDS:
            self.told, rate = now, done / (now - self.start)
            left = tqdm.format_interval((self.total - done) / rate)
            self.job.print(f"{self.place}: {done} of {self.total} {self.unit}, {rate:.2f} per second, {left} left")


@contextlib.contextmanager
def stage_line(job: Job, name: str, place: str, total: int, unit: str) -> Iterator[StageLine]:
    line = StageLine(job, name, place, total, unit)
    try:
        yield line
    finally:
        line.bar.close()


@dataclass
class Stages:
    """Runs each stage timed, watched for progress and shown; all ranks can stop together before each stage."""

    job: Job
    clock: StageClock
    guard: Guard
    tell: Callable[[str, int, int, str], None] = lambda stage, done, total, unit: None  # what else shows progress
    line: StageLine | None = None

    @contextlib.contextmanager
    def __call__(self, name: str, epoch: int, step: int | None = None, total: int = 0, unit: str = "") -> Iterator[None]:
        """Run a stage of an epoch, counted from 1, or an optimizer step of it, counted from 0. A rank that leaves the stage early
        continues after it. total, unit: what progress() and asked() count."""
        place = f"{name} of epoch {epoch}" if step is None else f"step {step + 1} of the {name} of epoch {epoch}"
        self.guard.enter(place)
        self.tell(name, 0, total, unit)
        with self.clock.stage(name), contextlib.suppress(LeaveStage), stage_line(self.job, name, place, total, unit) as self.line:
            yield  # if a rank leaves, the next agreement stops all ranks

    def progress(self, done: int) -> None:
        """Show that `done` units are done. Raises LeaveStage if this rank was asked to stop."""
        self.show(done)
        self.guard.progress()

    def asked(self, done: int) -> bool:
        """Show that `done` units are done; return whether this rank was asked to stop."""
        self.show(done)
        return self.guard.asked()

    def show(self, done: int) -> None:
        """Show that `done` units are done, wherever progress is shown."""
        self.line.show(done)
        self.tell(self.line.name, done, self.line.total, self.line.unit)
