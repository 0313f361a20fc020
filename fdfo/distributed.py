"""All distributed code: process group, collectives that also work for one process, and errors shared by all ranks."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from fdfo.config import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """This process among all processes of the job."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> range:
        """The contiguous block of range(count) that a rank (by default this one) works on; sizes differ by 1 at most."""
        rank = self.rank if rank is None else rank
        return range(count * rank // self.world_size, count * (rank + 1) // self.world_size)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: int) -> int:
        """Largest value over ranks."""
        return max(self.gather_objects(value))

    def gather_objects(self, value: T) -> list[T]:
        """The values of all ranks, in order, on every rank. For small Python objects and CPU tensors."""
        if self.world_size == 1:
            return [value]
        values: list[T] = [None] * self.world_size  # type: ignore[list-item]
        dist.all_gather_object(values, value)
        return values

    def on_main(self, function: Callable[[], T]) -> T:
        """Runs function on rank 0 alone; every rank gets its result, or raises its UserError."""
        outcome: list = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except UserError as error:
                outcome[1] = str(error)
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]

    def print(self, *parts: object) -> None:
        if self.is_main:
            print(*parts, flush=True)


@contextlib.contextmanager
def start_job() -> Iterator[Job]:
    """Joins the process group that torchrun describes (NCCL on GPUs, gloo on CPUs), or stands alone without torchrun."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Job(rank, world_size, device)
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Runs a command line; a UserError becomes one sentence on stderr (of rank 0) and exit code 2."""
    try:
        main()
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
