"""All distributed code: process group, collectives that also work for one process, and errors shared by all ranks."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from fdfo.config import UserError

T = TypeVar("T")
LOST = 3  # exit code of a process that has lost the others, or that made no progress


@dataclass(frozen=True)
class Job:
    """This process among all processes of the job."""

    rank: int
    world_size: int
    device: torch.device
    store: dist.Store | None = None  # what the ranks tell each other outside collectives; none for one process

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """The contiguous block of range(count) that this rank works on; the ranks' sizes differ by 1 at most."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)

    def rounds(self, count: int, size: int) -> list[tuple[slice, bool]]:
        """Slices of range(count), at most `size` long, equally many on every rank, for work that all ranks do together.

        count is 1 or more. A rank that is through gets its last slice again, marked False.
        """
        own = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        return [(own[min(i, len(own) - 1)], i < len(own)) for i in range(self.max(len(own)))]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            with self.contact():
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
        with self.contact():
            dist.all_gather_object(values, value)
        return values

    def on_main(self, function: Callable[[], T]) -> T:
        """Runs function on rank 0 alone; every rank gets its result, or ends with its error."""
        outcome: list = [None, None]
        failure = None
        if self.is_main:
            try:
                outcome[0] = function()
            except Exception as error:  # raised again below, once the other ranks know
                failure, outcome[1] = error, str(error)
        if self.world_size > 1:
            with self.contact():
                dist.broadcast_object_list(outcome, src=0, device=self.device)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]

    def post(self, stage: str) -> None:
        """Lets the other ranks know where this one is."""
        if self.store is not None:
            self.store.set(f"stage {self.rank}", stage)

    def whereabouts(self) -> str:
        """The stage that each rank has told last."""
        if self.store is None:
            return ""
        ranks = [rank for rank in range(self.world_size) if self.store.check([f"stage {rank}"])]
        return ", ".join(f"rank {rank} {self.store.get(f'stage {rank}').decode()}" for rank in ranks)

    @contextlib.contextmanager
    def contact(self) -> Iterator[None]:
        """A collective. Where it fails another rank is gone: says where all of them were, and ends the process at once."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:200]
            places = self.whereabouts() or "before the first stage"
            print(
                f"error: rank {self.rank} has lost the other processes ({reason}); last seen: {places}. Resume the run from its "
                "newest checkpoint.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(LOST)  # torchrun may be about to end this process too, and a tidy exit would wait for the lost rank

    def print(self, *parts: object) -> None:
        if self.is_main:
            print(*parts, flush=True)


@contextlib.contextmanager
def start_job(timeout_minutes: float = 30.0) -> Iterator[Job]:
    """Joins the process group that torchrun describes (NCCL on GPUs, gloo on CPUs), or stands alone without torchrun.

    A process that waits longer than timeout_minutes for the others ends.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"There are {torch.cuda.device_count()} GPU(s) here: start that many processes or fewer on this machine."
            )
        torch.cuda.set_device(device)
    store = None
    if world_size > 1:
        store, rank, world_size = next(dist.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store still has what the processes before left
        store = dist.PrefixStore(f"attempt {attempt}", store)
        backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(minutes=timeout_minutes)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    yield Job(rank, world_size, device, store)
    if world_size > 1:  # not after an error: the other ranks may wait in a collective until torchrun ends them
        dist.destroy_process_group()


def check_device(precision: str, device: torch.device) -> None:
    """Raises UserError when a half precision is asked for without a GPU."""
    if precision != "fp32" and device.type == "cpu":
        raise UserError(
            "There is no GPU here, and this model needs one: try `python train.py --preset tiny`, which needs none, or add "
            "--precision fp32 to run on the CPU all the same."
        )


def run_command_line(main: Callable[[], None]) -> None:
    """Runs a command line and ends the process; a UserError, or a full GPU, becomes one sentence on stderr and exit code 2.

    Where all ranks fail alike rank 0 says so and torchrun ends the others; a rank that is still there after ten seconds
    has failed alone and speaks for itself.
    """
    try:
        main()
    except (UserError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = "The GPU has no memory left: lower the batch size (--max-batch-size in train.py, --batch-size elsewhere)."
        rank = int(os.environ.get("RANK", 0))
        if rank:
            time.sleep(10)
        print(f"error: {error}" + (f" (rank {rank})" if rank else ""), file=sys.stderr, flush=True)
        leave_job(2)
        sys.exit(2)
    except KeyboardInterrupt:  # outside a run's epochs, which end with a checkpoint
        print("stopped", file=sys.stderr, flush=True)
        leave_job(130)
        sys.exit(130)
    leave_job(0)


def leave_job(code: int) -> None:
    """Ends a process of several at once; one that stands alone goes on.

    A thread of gloo may drop the last reference to a tensor when the interpreter is already shutting down, which aborts the
    process. Closing the process group does not end those threads while a sharded model still refers to it.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
