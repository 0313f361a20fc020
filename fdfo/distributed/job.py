"""This process among all processes of the job: shares of the work, and collectives that also work for one process."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from fdfo.config.errors import UserError

T = TypeVar("T")
LOST = 3  # exit code of a process that has lost the others, or that made no progress


class ToldByMain(UserError):
    """An error of rank 0 on another rank, which need not tell it again."""


@dataclass(frozen=True)
class Job:
    """This process among all processes of the job."""

    rank: int
    world_size: int
    device: torch.device
    store: dist.Store | None = None  # tells the ranks' stages outside of collectives; None for one process

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return the contiguous block of range(count) that this rank works on; the ranks' sizes differ by 1 at most."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def rounds(self, own: list[T]) -> list[tuple[T, bool]]:
        """Return this rank's pieces of work, equally many on every rank, for work that all ranks do together.

        own has 1 or more. A rank with fewer pieces than another repeats its last one, marked False.
        """
        return [(own[min(i, len(own) - 1)], i < len(own)) for i in range(self.max(len(own)))]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over ranks, in place."""
        if self.world_size > 1:
            with self.collective():
                dist.all_reduce(tensor)
        return tensor

    def max(self, value: int) -> int:
        """Return the largest value over ranks."""
        return max(self.gather_objects(value))

    def gather_objects(self, value: T) -> list[T]:
        """Return the values of all ranks, in order, on every rank. For small Python objects and CPU tensors."""
        if self.world_size == 1:
            return [value]
        values: list[T] = [None] * self.world_size  # type: ignore[list-item]
        with self.collective():
            dist.all_gather_object(values, value)
        return values

    def on_main(self, function: Callable[[], T]) -> T:
        """Run a function on rank 0 alone; every rank gets its result, or ends with its error."""
        result, failure = None, None
        if self.is_main:
            try:
                result = function()
            except (Exception, SystemExit) as error:  # raised again below, once the other ranks know
                failure = error
        if self.world_size > 1:
            outcome = [result, None if failure is None else str(failure)]
            with self.collective():
                dist.broadcast_object_list(outcome, src=0, device=self.device)
            if not self.is_main and outcome[1] is not None:
                raise ToldByMain(outcome[1])
            result = outcome[0]
        if failure is not None:
            raise failure
        return result

    def report_stage(self, stage: str) -> None:
        """Tell the other ranks which stage this one is in."""
        if self.store is not None:
            self.store.set(f"stage {self.rank}", stage)

    def last_stages(self) -> str:
        """Return the stage that each rank reported last."""
        if self.store is None:
            return ""
        ranks = [rank for rank in range(self.world_size) if self.store.check([f"stage {rank}"])]
        return ", ".join(f"rank {rank} {self.store.get(f'stage {rank}').decode()}" for rank in ranks)

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Wrap a collective: if it fails, a rank has died; report every rank's last stage and exit."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:200]
            stages = self.last_stages() or "before the first stage"
            print(
                f"error: rank {self.rank} has lost the other processes ({reason}); last seen: {stages}. Resume the run from its "
                "newest checkpoint.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(LOST)  # torchrun may be about to end this process too, and a tidy exit would wait for the lost rank

    def print(self, *parts: object) -> None:
        """Print on rank 0."""
        if self.is_main:
            print(*parts, flush=True)
