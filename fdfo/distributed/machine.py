"""Measures this process: seconds by stage, progress, memory, versions."""

import contextlib
import resource
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import TypeVar

import psutil
import torch
from tqdm import tqdm

from fdfo.distributed.job import Job

T = TypeVar("T")


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
        """Yield the items, timing how long each of them takes to arrive."""
        while True:
            with self.stage(name):
                item = next(items, None)
            if item is None:
                return
            yield item

    def take(self, name: str) -> float:
        """Return the seconds of one stage since the last reading, rounded to milliseconds; the next reading leaves them out."""
        return round(self.seconds.pop(name, 0.0), 3)

    def read(self) -> dict[str, float]:
        """Return the seconds by stage, rounded to milliseconds, and start again from 0."""
        seconds, self.seconds = self.seconds, {}
        return {name: round(value, 3) for name, value in seconds.items()}


def progress_bar(job: Job, total: int, what: str, unit: str = "image", leave: bool = True) -> tqdm:
    """Show rank 0's share of the work with the time left; nothing if the output is no terminal, or for a total of 0."""
    return tqdm(total=total, desc=what, unit=unit, leave=leave, disable=None if job.is_main and total else True)


def versions() -> dict[str, str]:
    """Return the versions of the libraries that affect results."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}


def memory_gib(device: torch.device) -> float:
    """Return the memory in use now: allocated on the GPU, or resident on the CPU, GiB."""
    if device.type == "cuda":
        return round(torch.cuda.memory_allocated(device) / 2**30, 4)
    return round(psutil.Process().memory_info().rss / 2**30, 4)


def peak_memory_gib(device: torch.device) -> float:
    """Return the largest memory in use so far: allocated on the GPU, or resident on the CPU, GiB."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
