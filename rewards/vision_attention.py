"""One variable-length attention for all windows of Qwen2.5-VL's vision tower, where the library makes one call a window."""

import importlib.util

import torch
from torch import nn
from transformers import AttentionInterface

NAME = "varlen_flash"  # "flash" in the name makes the tower hand over the windows' bounds instead of splitting them


def use_varlen_attention(visual: nn.Module, device: torch.device) -> None:
    """Lets the vision tower use it on a GPU in half precision; older PyTorch has no such attention and keeps the library's."""
    if device.type != "cuda" or importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return
    AttentionInterface.register(NAME, varlen_attention)
    visual.config._attn_implementation = NAME


def varlen_attention(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mask: None, scaling: float,
    cu_seq_lens_q: torch.Tensor, cu_seq_lens_k: torch.Tensor, max_length_q: int, max_length_k: int, **unused: object,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """q, k, v [1, H, S, D] of all windows in a row, cu_seq_lens [windows + 1] int32 their bounds -> [1, S, H, D]."""
    assert abs(scaling * q.shape[-1] ** 0.5 - 1) < 1e-6, "the kernel scales by 1 / sqrt(D)"
    from torch.nn.attention.varlen import varlen_attn

    rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (q, k, v)]  # [S, H, D]
    mixed = varlen_attn(*rows, cu_seq_lens_q, cu_seq_lens_k, int(max_length_q), int(max_length_k))
    return mixed[None], None
