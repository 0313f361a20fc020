"""FSDP2 for the VLM judge: its weights spread over the job's processes, gathered block by block when needed."""

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from fdfo.distributed import Job

TRAINING_ROOM = 40 * 2**30  # bytes left free beside an unsharded judge: full-size training peaks at 22 to 38 GiB


def build_on_meta(name: str, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    """The architecture of a hub id or folder, without weights."""
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration._from_config(AutoConfig.from_pretrained(name), dtype=dtype)


def needs_sharding(name: str, dtype: torch.dtype, job: Job) -> bool:
    """Whether some GPU of a job of several processes lacks the room for all the weights; on CPUs always. The same on all ranks."""
    if job.world_size == 1:
        return False
    if job.device.type == "cpu":
        return True
    weights = sum(p.numel() * p.element_size() for p in build_on_meta(name, dtype).parameters())
    free, _ = torch.cuda.mem_get_info(job.device)
    return bool(job.max(int(free < weights + TRAINING_ROOM)))


def load_sharded(name: str, dtype: torch.dtype, job: Job) -> Qwen2_5_VLForConditionalGeneration:
    """The model with every block sharded. Rank 0 alone reads the weights, so that the host holds them once."""
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
