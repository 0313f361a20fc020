"""The stages of a run: timed, watched, shown while they last, and places where all ranks can stop together."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tqdm import tqdm

from fdfo.distributed import Job
from fdfo.meters import StageClock, progress_bar
from fdfo.preemption import Guard, LeaveStage

PLAIN_SECONDS = 60  # between two lines about a stage where the output is no terminal


class StageLine:
    """How far rank 0 is with its share of a stage, with the rate and the time left: a line that is written over on a terminal,
    a plain line a minute elsewhere, nothing on other ranks."""

    def __init__(self, job: Job, place: str, total: int, unit: str):
        """total: 0 for a stage that cannot tell how far it is."""
        self.job, self.place, self.total, self.unit = job, place, total, unit
        self.bar = progress_bar(job, total, place, f" {unit}", leave=False)
        self.start = self.told = time.monotonic()

    def show(self, done: int) -> None:
        now = time.monotonic()
        if not self.bar.disable:
            self.bar.update(done - self.bar.n)
        elif done and self.job.is_main and now - self.told > PLAIN_SECONDS:
            self.told, rate = now, done / (now - self.start)
            left = tqdm.format_interval((self.total - done) / rate)
            self.job.print(f"{self.place}: {done} of {self.total} {self.unit}, {rate:.2f} a second, {left} left")


@contextlib.contextmanager
def stage_line(job: Job, place: str, total: int, unit: str) -> Iterator[StageLine]:
    line = StageLine(job, place, total, unit)
    try:
        yield line
    finally:
        line.bar.close()


@dataclass
class Stages:
    """Every stage of a run is timed, watched, shown, and a place where all ranks can stop together."""

    job: Job
    clock: StageClock
    guard: Guard
    line: StageLine | None = None

    @contextlib.contextmanager
    def __call__(self, name: str, epoch: int, step: int | None = None, total: int = 0, unit: str = "") -> Iterator[None]:
        """A stage of this epoch, counted from 1, and for the update of one of its steps, counted from 0. A rank that leaves it
        ends up behind it. total, unit: what progress() and asked() are told of."""
        place = f"{name} of epoch {epoch}" if step is None else f"step {step + 1} of the {name} of epoch {epoch}"
        self.guard.enter(place)
        with self.clock.stage(name), contextlib.suppress(LeaveStage), stage_line(self.job, place, total, unit) as self.line:
            yield  # where a rank leaves, the next agreement stops all ranks

    def progress(self, done: int) -> None:
        """So much of the stage is done. Raises LeaveStage where this rank was asked to stop."""
        self.line.show(done)
        self.guard.pulse_or_leave()

    def asked(self, done: int) -> bool:
        """So much of the stage is done. Whether this rank was asked to stop."""
        self.line.show(done)
        return self.guard.asked()
