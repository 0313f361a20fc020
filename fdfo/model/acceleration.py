"""Makes full-size training fast, or small in memory: types, attention kernels, compiled or checkpointed blocks, offloaded weights."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

ATTENTION_ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def cast_frozen_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast linear and convolution weights to the compute type, as autocast would at every call, and norms to float32.

    Norms are float32 so that queries and keys are not rounded to bfloat16 before the attention. Parameters of the module itself are
    tokens that join activations of the compute type.
    """
    for part in module.modules():
        kind = dtype if part is module or isinstance(part, nn.Linear | nn.Conv2d) else torch.float32
        for name, parameter in part.named_parameters(recurse=False):
            if not parameter.requires_grad:
                setattr(part, name, nn.Parameter(parameter.to(kind), requires_grad=False))


@contextlib.contextmanager
def fast_attention(device: torch.device) -> Iterator[None]:
    """Prefer cuDNN's attention inside: the fastest of the fused kernels on Hopper GPUs."""
    with sdpa_kernel(ATTENTION_ORDER, set_priority=True) if device.type == "cuda" else contextlib.nullcontext():
        yield


def checkpointing(device: torch.device) -> Callable[..., object]:
    """Return the function that diffusers calls as function(block, *inputs) for gradient checkpointing.

    The backward pass computes the block again under the autocast and the attention kernels of its forward pass. PyTorch restores
    the autocast by itself, but not the kernels. The network draws no random numbers, so no generator's state is kept.
    """

    def run(block: nn.Module, *inputs: object) -> object:
        def contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
            return contextlib.nullcontext(), fast_attention(
                device
            )  # of the first forward, which is inside it already; of the second

        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    return run


def compile_blocks(blocks: list[tuple[nn.Module, bool]]) -> None:
    """Compile each block by itself: blocks of one kind share their code, so three or four sets of kernels serve all.

    blocks: each with whether its kernels must serve inputs of any size.

    Without Inductor's deterministic mode, reduction kernels are chosen by timing, so two processes, or two starts, may round
    differently. PyTorch 2.9 has no such mode.
    """
    torch._dynamo.config.recompile_limit = 64  # kinds of block x adapter on and off
    options = {"deterministic": True} if "deterministic" in torch._inductor.list_options() else None
    for block, dynamic in blocks:
        block.compile(dynamic=dynamic, options=options)


def uncompile_blocks(blocks: list[tuple[nn.Module, bool]]) -> None:
    for block, _ in blocks:
        block._compiled_call_impl = None


def try_compiled(blocks: list[tuple[nn.Module, bool]], warm_up: Callable[[], None]) -> str | None:
    """Compile the blocks and run warm_up; if that fails, leave the blocks eager and return the reason."""
    compile_blocks(blocks)
    try:
        warm_up()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler fails in many ways: any of them means eager
        uncompile_blocks(blocks)
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return None


def pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """Repeat the first row until there are `rows`: [n, ...] -> [rows, ...]."""
    missing = rows - len(tensor)
    return tensor if missing == 0 else torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])])


def fetch(part: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a small tensor to the device; from host memory to a GPU without waiting for the copy."""
    return part.pin_memory().to(device, non_blocking=True) if part.device.type != device.type else part


class PinnedWeights:
    """Frozen modules that wait in pinned host memory; loaded() copies them to the device, and drops the copy afterwards."""

    def __init__(self, modules: list[nn.Module], device: torch.device):
        """Move the modules' weights to the host, pinned if the device is a GPU."""
        self.device, self.home = device, []
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                host = tensor.data.cpu()
                tensor.data = host.pin_memory() if device.type == "cuda" else host
                self.home.append((tensor, tensor.data))

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """Bring the weights to the device inside."""
        for tensor, host in self.home:
            tensor.data = host.to(self.device, non_blocking=True)
        try:
            yield
        finally:
            for tensor, host in self.home:
                tensor.data = host
