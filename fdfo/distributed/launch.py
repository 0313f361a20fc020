"""Starts and ends the process of a command line, alone or under torchrun."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from fdfo.config.errors import UserError
from fdfo.distributed.job import Job, ToldByMain
from fdfo.distributed.output import writable_output


@contextlib.contextmanager
def start_job(timeout_minutes: float = 30.0) -> Iterator[Job]:
    """Join the process group that torchrun describes (NCCL on GPUs, gloo on CPUs), or run alone without torchrun.

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
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store still has the last attempt's entries
        store = dist.PrefixStore(f"attempt {attempt}", store)
        backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(minutes=timeout_minutes)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    yield Job(rank, world_size, device, store)
    if world_size > 1:  # not after an error: the other ranks may wait in a collective until torchrun ends them
        dist.destroy_process_group()


def check_device(precision: str, device: torch.device) -> None:
    """Raise UserError if a half precision is asked for without a GPU."""
    if precision != "fp32" and device.type == "cpu":
        raise UserError(
            "There is no GPU here, and this model needs one: try `python train.py --preset tiny`, which needs none, or add "
            "--precision fp32 to run on the CPU all the same."
        )


def run_command_line(main: Callable[[], None]) -> None:
    """Run a command line and end the process; a UserError, or a full GPU, becomes one sentence on stderr and exit code 2."""
    with writable_output():
        call(main)


def call(main: Callable[[], None]) -> None:
    """Call the main function of a command line, and exit as run_command_line says."""
    try:
        main()
    except (UserError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = "The GPU has no memory left: lower the batch size (--max-batch-size in train.py, --batch-size elsewhere)."
        if not isinstance(error, ToldByMain):
            rank = int(os.environ.get("RANK", 0))
            print(f"error: {error}" + (f" (rank {rank})" if rank else ""), file=sys.stderr, flush=True)
        leave_job(2)
        sys.exit(2)
    except KeyboardInterrupt:  # outside a run's epochs, which end with a checkpoint
        print("stopped", file=sys.stderr, flush=True)
        leave_job(130)
        sys.exit(130)
    leave_job(0)


def leave_job(code: int) -> None:
    """End a process of several at once; return if it runs alone.

    A thread of gloo may drop the last reference to a tensor while the interpreter shuts down, which aborts the process. Closing
    the process group does not end those threads while a sharded model still refers to it.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
