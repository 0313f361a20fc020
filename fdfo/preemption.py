"""What ends a run from outside: the machine's or the user's signal, and a stage that makes no progress."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from fdfo.distributed import LOST, Job

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)  # of Slurm and spot instances, Ctrl-C, a closed terminal


class Stopped(Exception):
    """All ranks have agreed to stop. Its text says who asked, and where the run was."""


class LeaveStage(Exception):
    """This rank was asked to stop and leaves its stage; the others learn it when they come to the next one."""


class Guard:
    """Remembers a signal until all ranks can agree to stop, and ends a process that makes no progress.

    A rank that got a signal leaves its stage where it can, at the latest at the stage's end. All ranks agree at the start
    of each stage, so that they leave the run together and at the same place.
    """

    def __init__(self, job: Job, timeout_minutes: float):
        self.job, self.limit = job, 60 * timeout_minutes
        self.received: str | None = None
        self.on_terminal = [stream for stream in (sys.__stdout__, sys.__stderr__) if stream.isatty()]
        self.place, self.seen = "starting", time.monotonic()
        self.over = threading.Event()

    def handle(self, number: int, frame: object) -> None:
        """The signal handler: remembers, and does nothing that could break what it interrupts."""
        self.leave_closed_terminal()
        if self.received is None:
            self.received = signal.Signals(number).name
            text = f"{self.received} on rank {self.job.rank}: stopping at the next safe point, with a checkpoint\n"
            os.write(sys.__stderr__.fileno(), text.encode())

    def leave_closed_terminal(self) -> None:
        """What is still written goes nowhere: a write that fails would end the run without a checkpoint.

        Processes of torchrun have sessions of their own, so that they get its SIGTERM when the terminal is closed, and no SIGHUP.
        """
        for stream in self.on_terminal:
            if not stream.isatty():
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)

    def enter(self, place: str) -> None:
        """Agrees with all ranks whether to go on, and tells them where this one is. Raises Stopped on all of them, or none."""
        self.place, self.seen = f"the wait before {place}", time.monotonic()
        self.job.post(f"in {self.place}")
        asked = [f"{name} on rank {rank}" for rank, name in enumerate(self.job.gather_objects(self.received)) if name]
        if asked:
            raise Stopped(f"{asked[0]}, stopped before {place}")
        self.place, self.seen = place, time.monotonic()
        self.job.post(f"in {place}")

    def asked(self) -> bool:
        """There is progress. Whether this rank was asked to stop."""
        self.seen = time.monotonic()
        return self.received is not None

    def pulse_or_leave(self) -> None:
        """There is progress. Raises LeaveStage where this rank was asked to stop: for stages that ranks do by themselves."""
        if self.asked():
            raise LeaveStage

    def watch(self) -> None:
        """Ends the process once it has made no progress for too long. Runs in a thread of its own."""
        while not self.over.wait(min(1.0, self.limit / 4)):
            if time.monotonic() - self.seen > self.limit:
                places = self.job.whereabouts()
                print(
                    f"error: rank {self.job.rank} made no progress for {self.limit / 60:g} minutes in {self.place}"
                    + (f" ({places})" if places else "")
                    + ": mend what hangs there, or raise --timeout-minutes; the run resumes from its newest checkpoint.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(LOST)


@contextlib.contextmanager
def guarded(job: Job, timeout_minutes: float) -> Iterator[Guard]:
    """Signals and progress are looked after inside. nohup's wish that a closed terminal be ignored is respected."""
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
