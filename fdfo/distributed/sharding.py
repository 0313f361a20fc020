"""A frozen network spread over the job's devices by FSDP2, and how processes with unequal work call it equally often."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from fdfo.distributed.job import Job

WORKING_ROOM = 4 * 2**30  # bytes for activations beside all weights
DONE, FORWARD, BACKWARD = 0, 1, 2


def needs_sharding(job: Job, modules: list[nn.Module]) -> bool:
    """Return whether a GPU of a job of several processes cannot hold the weights of all modules. The same on all ranks."""
    if job.world_size == 1 or job.device.type == "cpu":
        return False
    weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    total = torch.cuda.get_device_properties(job.device).total_memory
    return bool(job.max(int(total < weights + WORKING_ROOM)))


def shard_blocks(network: nn.Module, blocks: list[nn.Module]) -> None:
    """Shard the frozen weights of the blocks' linear layers; they leave the host block by block. All others stay whole."""
    for block in blocks:
        layers = [part for part in block.modules() if isinstance(part, nn.Linear)]
        frozen = {p for layer in layers for p in layer.parameters(recurse=False) if not p.requires_grad}
        fully_shard(block, ignored_params={*block.parameters()} - frozen)
    fully_shard(network, ignored_params={*network.parameters()})  # the root, which has no weights of its own


class Lockstep:
    """Keeps processes in step: each call of a sharded network gathers weights from all of them.

    A process that has done its share makes idle calls until all have.
    """

    def __init__(self, job: Job):
        self.job = job

    def announce(self, idle: Callable[[], torch.Tensor]) -> None:
        """Say, before a call, that this process works. idle: a small call of the same kind, for later."""
        self.idle = idle
        self.job.max(BACKWARD if torch.is_grad_enabled() else FORWARD)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Let processes call the network inside as often as each needs; with gradients, a call's backward must follow it."""
        try:
            yield
        finally:  # also for a process that leaves its stage early
            while (kind := self.job.max(DONE)) != DONE:
                with torch.set_grad_enabled(kind == BACKWARD):
                    output = self.idle()
                    if kind == BACKWARD:
                        (0 * output.float().sum()).backward()
