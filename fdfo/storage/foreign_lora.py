"""Reads the LoRA files of other programs, and translates their names for the layers of an SD3 transformer into diffusers' names.

Read are lora_A / lora_B, lora_down / lora_up and lora.down / lora.up, with or without alpha, for diffusers' names of the layers
(transformer.transformer_blocks.0.attn.to_q, lora_transformer_transformer_blocks_0_attn_to_q) and for Stability's own, in which
queries, keys and values are one layer (lora_unet_joint_blocks_0_x_block_attn_qkv).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fdfo.config.errors import UserError

METADATA = "lora_adapter_metadata"  # under which diffusers keeps PEFT's settings in the header of the file
TENSOR = re.compile(r"(.+)\.(?:lora_(?:(A|down)|(?:B|up))(?:\.default)?|lora\.(?:(down)|up))\.weight")
ALPHA = re.compile(r"(.+)\.alpha")
PREFIX = re.compile(r"base_model\.model\.|transformer\.|diffusion_model\.|lora_transformer_|lora_unet_")
BLOCK = re.compile(r"(transformer|joint)_blocks[._](\d+)[._](.+)")
LEAVES = {
    leaf.replace(".", "_"): leaf
    for leaf in (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
        "ff_context.net.2", "norm1.linear", "norm1_context.linear",
    )
}  # fmt: skip
JOINT_LEAVES = {  # Stability's name of a layer: diffusers' names of its parts, in their order
    "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block_attn_proj": ("attn.to_out.0",),
    "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block_attn2_proj": ("attn2.to_out.0",),
    "x_block_mlp_fc1": ("ff.net.0.proj",),
    "x_block_mlp_fc2": ("ff.net.2",),
    "context_block_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block_attn_proj": ("attn.to_add_out",),
    "context_block_mlp_fc1": ("ff_context.net.0.proj",),
    "context_block_mlp_fc2": ("ff_context.net.2",),
}


@dataclass(frozen=True)
class LoraLayer:
    """W + (alpha / r) B A of one layer; alpha is None if the file does not give it."""

    A: torch.Tensor  # [r, K]
    B: torch.Tensor  # [M, r]
    alpha: float | None


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file: its layers by diffusers' names, and PEFT's settings if diffusers wrote them."""

    layers: dict[str, LoraLayer]
    settings: dict | None


def read_lora_file(path: Path) -> LoraFile:
    """Read a LoRA file (.safetensors). Raises UserError if it cannot be read, or holds more than a plain LoRA."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            text = (file.metadata() or {}).get(METADATA)
        settings = None if text is None else _of_transformer(json.loads(text))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a LoRA file ({error}): give a whole .safetensors file.") from error
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if match := TENSOR.fullmatch(key):
            name, part = match[1], "A" if match[2] or match[3] else "B"
        elif match := ALPHA.fullmatch(key):
            name, part = match[1], "alpha"
        else:
            raise UserError(f"{path} is more than a plain LoRA (it has {key[:200]}): give a plain one.")
        found.setdefault(name, {})[part] = tensor
    if not found:
        raise UserError(f"{path} has no weights: give another LoRA.")
    layers: dict[str, LoraLayer] = {}
    for name, parts in found.items():
        for module, layer in _layers(path, name, parts):
            if module in layers:
                raise UserError(f"{path} gives the layer {module} twice: give a file that names each layer once.")
            layers[module] = layer
    return LoraFile(layers, settings)


def _of_transformer(settings: object) -> dict | None:
    """Return PEFT's settings of the transformer's LoRA. Raises ValueError if they are no settings."""
    if not isinstance(settings, dict):
        raise ValueError(f"its {METADATA} is not an object")
    own = {key.removeprefix("transformer."): value for key, value in settings.items() if key.startswith("transformer.")}
    return own or None


def _layers(path: Path, name: str, parts: dict[str, torch.Tensor]) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the layers that one name of the file stands for. Raises UserError if its tensors are no plain LoRA."""
    modules, A, B, alpha = translated(name), parts.get("A"), parts.get("B"), parts.get("alpha")
    if A is None or B is None or A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or B.shape[0] % len(modules):
        raise UserError(f"{path} is more, or less, than a plain LoRA (at {name[:200]}): give a plain one.")
    if alpha is not None and (alpha.numel() != 1 or not 0 < alpha.item() < float("inf")):
        raise UserError(f"{path} has no positive alpha at {name[:200]}: give another LoRA.")
    for module, part in zip(modules, B.chunk(len(modules)), strict=True):
        yield module, LoraLayer(A, part, None if alpha is None else alpha.item())


def translated(name: str) -> tuple[str, ...]:
    """Return diffusers' names of the layers that a name means; one that is not known stays, without its prefix."""
    own = PREFIX.sub("", name, count=1) if PREFIX.match(name) else name
    if not (match := BLOCK.fullmatch(own)):
        return (own,)
    kind, block, leaf = match[1], match[2], match[3].replace(".", "_")
    leaves = JOINT_LEAVES.get(leaf) if kind == "joint" else (LEAVES.get(leaf, match[3]),)
    return (own,) if leaves is None else tuple(f"transformer_blocks.{block}.{part}" for part in leaves)
