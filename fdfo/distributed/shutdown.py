"""Ends a run from outside: after a signal, or because a stage makes no progress."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from fdfo.distributed.job import LOST, Job

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)  # of Slurm and spot instances, Ctrl-C, a closed terminal


class Stopped(Exception):
    """All ranks have agreed to stop. The text says who asked, and where the run was."""


class LeaveStage(Exception):
    """This rank was asked to stop and leaves its stage; the others learn it at the start of the next stage."""


class Guard:
    """Remembers a signal until all ranks agree to stop, and ends a process that makes no progress.

    The signalled rank finishes its micro-batch or its stage. All ranks agree at the start of each stage, so they stop together.
    """

    def __init__(self, job: Job, timeout_minutes: float):
        self.job, self.limit = job, 60 * timeout_minutes
        self.received: str | None = None
        self.place, self.quiet = "starting", 0.0  # seconds without progress
        self.over = threading.Event()

    def handle(self, number: int, frame: object) -> None:
        """Handle a signal: remember it, and do nothing that could break the code that it interrupts."""
        if self.received is None:
            self.received = signal.Signals(number).name
            text = f"{self.received} on rank {self.job.rank}: stopping at the next safe point, with a checkpoint\n"
            with contextlib.suppress(OSError):  # a closed terminal
                os.write(2, text.encode())

    def enter(self, place: str) -> None:
        """Agree with all ranks whether to continue, and report this one's stage. Raises Stopped on all ranks or on none."""
        self.place, self.quiet = f"the wait before {place}", 0.0
        self.job.report_stage(f"in {self.place}")
        asked = [f"{name} on rank {rank}" for rank, name in enumerate(self.job.gather_objects(self.received)) if name]
        if asked:
            raise Stopped(f"{asked[0]}, stopped before {place}")
        self.place, self.quiet = place, 0.0
        self.job.report_stage(f"in {place}")

    def asked(self) -> bool:
        """Note progress; return whether this rank was asked to stop."""
        self.quiet = 0.0
        return self.received is not None

    def progress(self) -> None:
        """Note progress. Raises LeaveStage if this rank was asked to stop, in stages without collectives."""
        if self.asked():
            raise LeaveStage

    def watch(self) -> None:
        """End the process once it has made no progress for too long. Runs in a thread of its own.

        It counts its own ticks: a clock would also count the time that the process is stopped by Ctrl-Z.
        """
        tick = min(1.0, self.limit / 4)
        while not self.over.wait(tick):
            self.quiet += tick
            if self.quiet > self.limit:
                stages = self.job.last_stages()
                print(
                    f"error: rank {self.job.rank} made no progress for {self.limit / 60:g} minutes in {self.place}"
                    + (f" ({stages})" if stages else "")
                    + ": fix what hangs there, or raise --timeout-minutes; then resume the run from its newest checkpoint.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(LOST)


@contextlib.contextmanager
def guarded(job: Job, timeout_minutes: float) -> Iterator[Guard]:
    """Watch signals and progress inside. Under nohup a closed terminal is ignored."""
    guard = Guard(job, timeout_minutes)
    wanted = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, guard.handle) for number in wanted}
    threading.Thread(target=guard.watch, daemon=True).start()
    try:
        yield guard
    finally:
        guard.over.set()
        for number, handler in before.items():
            signal.signal(number, handler)
