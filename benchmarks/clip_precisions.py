"""Ways to run a CLIP scorer that cost less than plain float32, for judge_speed.py: each a context in which the scorer works so."""

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from fdfo.model.acceleration import compile_blocks, uncompile_blocks
from rewards.scorers.clip import ClipScorer

Context = contextlib.AbstractContextManager


def ways(scorer: ClipScorer) -> dict[str, Callable[[], Context]]:
    """Return by name what to enter before scoring; the first is the scorer as it is."""
    tower, kind = scorer.model.vision_model, scorer.device.type
    return {
        "float32, as it is": contextlib.nullcontext,
        "float32, the patches' convolution, too": full_convolution,
        "float32, vision blocks compiled": lambda: compiled(tower),
        "TF32 in the vision tower": lambda: inside(tower, lambda: legacy_precision("high")),
        'precision "medium" in the vision tower': lambda: inside(tower, lambda: legacy_precision("medium")),
        "bfloat16 in two parts": lambda: split_linear(tower, torch.bfloat16),
        "float16 in two parts": lambda: split_linear(tower, torch.float16),
        "bfloat16 in two parts, compiled": lambda: both(split_linear(tower, torch.bfloat16), compiled(tower)),
        "float16 in two parts, compiled": lambda: both(split_linear(tower, torch.float16), compiled(tower)),
        "float16 autocast of the vision tower": lambda: inside(tower, lambda: torch.autocast(kind, torch.float16)),
        "all in float16": lambda: float16(scorer),
        "PyTorch's bfloat16x3": lambda: inside(tower, lambda: new_precision("bf16x3")),
    }  # fmt: skip


@contextlib.contextmanager
def both(first: Context, second: Context) -> Iterator[None]:
    with first, second:
        yield


@contextlib.contextmanager
def inside(module: nn.Module, context: Callable[[], Context]) -> Iterator[None]:
    """Let the module alone run within a context."""
    forward = module.forward

    def run(*inputs: object, **settings: object) -> object:
        with context():
            return forward(*inputs, **settings)

    module.forward = run
    try:
        yield
    finally:
        del module.forward


@contextlib.contextmanager
def full_convolution() -> Iterator[None]:
    """cuDNN's convolutions take TF32 by default, unlike matrix products."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def legacy_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def new_precision(name: str) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = name
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@contextlib.contextmanager
def compiled(tower: nn.Module) -> Iterator[None]:
    blocks = [(block, False) for block in tower.encoder.layers]
    compile_blocks(blocks)
    try:
        yield
    finally:
        uncompile_blocks(blocks)


@contextlib.contextmanager
def float16(scorer: ClipScorer) -> Iterator[None]:
    model, scorer.model = scorer.model, copy.deepcopy(scorer.model).half()
    try:
        yield
    finally:
        scorer.model = model


def in_two_parts(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a float32 tensor rounded to a 16-bit type, and the rest, rounded likewise.

    The first rounding is of the bits, since Inductor takes a float32 that went through another type for unchanged.
    """
    dropped = 2 ** (23 - {torch.bfloat16: 7, torch.float16: 10}[dtype])  # the mantissa's last bits
    high = ((tensor.view(torch.int32) + dropped // 2) & -dropped).view(torch.float32)
    return high.to(dtype), (tensor - high).to(dtype)


class SplitLinear(nn.Module):
    """x W^T + b of a linear layer from 16-bit factors: high high + low high + high low in one product, summed in float32.

    What is left out is low low, and what two parts of 8 (bfloat16) or 11 (float16) bits cannot hold.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        super().__init__()
        high, low = in_two_parts(layer.weight.detach(), dtype)
        self.register_buffer("factor", torch.cat([high, high, low], dim=1).t())  # [3 in, out]
        self.bias, self.dtype = layer.bias, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] float32 -> [..., out] float32."""
        high, low = in_two_parts(x.flatten(0, -2), self.dtype)
        factors = torch.cat([high, low, high], dim=1)  # [rows, 3 in]
        if x.is_cuda:
            product = torch.mm(factors, self.factor, out_dtype=torch.float32)
        else:
            product = factors.float() @ self.factor.float()
        return (product + self.bias).unflatten(0, x.shape[:-1])


@contextlib.contextmanager
def split_linear(tower: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let all linear layers of a tower multiply in two parts."""
    layers = {name: module for name, module in tower.named_modules() if isinstance(module, nn.Linear)}
    for name, layer in layers.items():
        tower.set_submodule(name, SplitLinear(layer, dtype))
    try:
        yield
    finally:
        for name, layer in layers.items():
            tower.set_submodule(name, layer)
