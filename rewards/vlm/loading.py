"""Loads the VLM judge: sharded over the job if one GPU has no room for it, with one attention for all windows of its vision tower."""

import importlib.util

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AttentionInterface, AutoConfig, Qwen2_5_VLForConditionalGeneration

from fdfo.distributed.job import Job

TRAINING_ROOM = 40 * 2**30  # bytes left free beside an unsharded judge: full-size training peaks at 22 to 38 GiB
NAME = "varlen_flash"  # "flash" in the name makes the tower hand over the windows' bounds instead of splitting them


def build_on_meta(name: str, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    """Build the architecture of a hub id or folder, without weights."""
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration._from_config(AutoConfig.from_pretrained(name), dtype=dtype)


def needs_sharding(name: str, dtype: torch.dtype, job: Job) -> bool:
    """Return whether some GPU of a job of several processes has no room for all the weights; on CPUs always. The same on all ranks."""
    if job.world_size == 1:
        return False
    if job.device.type == "cpu":
        return True
    weights = sum(p.numel() * p.element_size() for p in build_on_meta(name, dtype).parameters())
    free, _ = torch.cuda.mem_get_info(job.device)
    return bool(job.max(int(free < weights + TRAINING_ROOM)))


def load_sharded(name: str, dtype: torch.dtype, job: Job) -> Qwen2_5_VLForConditionalGeneration:
    """Load the model with every block sharded. Only rank 0 reads the weights, so that the host holds them once."""
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(name, dtype=dtype) if job.is_main else None
    model = build_on_meta(name, dtype)
    for block in [*model.model.language_model.layers, *model.model.visual.blocks]:
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device=job.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole.state_dict() if job.is_main else {}, options=options)
    computed = dict(whole.named_buffers()) if job.is_main else {}  # rotary frequencies, which no state dict holds
    for buffer_name, buffer in model.named_buffers():
        if job.is_main:
            buffer.copy_(computed[buffer_name])
        dist.broadcast(buffer, src=0)
    return model


def use_varlen_attention(visual: nn.Module, device: torch.device) -> None:
    """Use variable-length attention in the vision tower on a GPU; older PyTorch has none and keeps the library's."""
    if device.type != "cuda" or importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return
    AttentionInterface.register(NAME, varlen_attention)
    visual.config._attn_implementation = NAME


def varlen_attention(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention_mask: None, scaling: float,
    cu_seq_lens_q: torch.Tensor, cu_seq_lens_k: torch.Tensor, max_length_q: int, max_length_k: int, **unused: object,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attend q, k, v [1, H, S, D] of all windows in a row, cu_seq_lens [windows + 1] int32 their bounds -> [1, S, H, D]."""
    assert abs(scaling * q.shape[-1] ** 0.5 - 1) < 1e-6, "the kernel scales by 1 / sqrt(D)"
    from torch.nn.attention.varlen import varlen_attn

    rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (q, k, v)]  # [S, H, D]
    mixed = varlen_attn(*rows, cu_seq_lens_q, cu_seq_lens_k, int(max_length_q), int(max_length_k))
    return mixed[None], None
