"""Writes an adapter in diffusers' LoRA format: W + B A, with the scale inside B and no alpha, so that no loader can scale it wrongly."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from fdfo.config.errors import UserError
from fdfo.storage.adapters import PEFT_KEY, read_lora_adapter
from fdfo.storage.hub import LORA_FILE

SDNEXT_FILE = "sdnext_lora.safetensors"
# By module of the transformer: A [r, K], B [M, r]; its weight W [M, K] becomes W + B A.
Lora = dict[str, tuple[torch.Tensor, torch.Tensor]]


def read_lora(source: Path) -> Lora:
    """Read the adapter in a folder of PEFT's, or in another program's file, scaled.

    Raises UserError for a damaged one, and for more than a plain LoRA.
    """
    adapter = read_lora_adapter(source)
    return scaled_lora(adapter.config, adapter.tensors, source)


def write_sdnext_lora(folder: Path, lora: Lora) -> None:
    """Write SDNEXT_FILE into the folder: the tensors of LORA_FILE under the names that SD.Next binds."""
    write_tensors(folder / SDNEXT_FILE, lora, ("down", "up"))


def write_lora(folder: Path, lora: Lora) -> None:
    """Write LORA_FILE into the folder, as the pipelines' load_lora_weights read it: the same bytes for the same adapter."""
    write_tensors(folder / LORA_FILE, lora, ("A", "B"))


def write_tensors(path: Path, lora: Lora, names: tuple[str, str]) -> None:
    """Write a LoRA file in float32. names: those of A and B."""
    tensors = {
        f"transformer.{module}.lora_{name}.weight": tensor.contiguous()
        for module, pair in lora.items()
        for name, tensor in zip(names, pair, strict=True)
    }
    save_file(tensors, path, metadata={"format": "pt"})


def scaled_lora(config: LoraConfig, state: dict[str, torch.Tensor], folder: Path) -> Lora:
    """Return the tensors of a PEFT adapter file as float32 pairs with PEFT's scale, alpha / r or alpha / sqrt(r), inside B.

    If modules differ in rank, zeros fill them up to the largest: some loaders take one rank, or its alpha, for all of them.
    Raises UserError, naming the folder, if the tensors are not those of the config's plain LoRA.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        if not (match := PEFT_KEY.fullmatch(key)):
            raise UserError(f"The adapter in {folder} is more than a plain LoRA (it has {key}): give a plain one.")
        found.setdefault(match[1], {})[match[2]] = tensor.float()
    if not found:
        raise UserError(f"The adapter in {folder} has no weights: restore its files.")
    largest = max(pair["A"].shape[0] for pair in found.values() if "A" in pair)
    lora = {}
    for module, pair in found.items():
        rank, scale = rank_and_scale(config, module)
        shapes = {name: tuple(tensor.shape) for name, tensor in pair.items()}
        if set(shapes) != {"A", "B"} or len(shapes["A"]) + len(shapes["B"]) != 4 or not shapes["A"][0] == shapes["B"][1] == rank:
            raise UserError(
                f"The adapter in {folder} does not have rank {rank} at {module}, as its config says: restore its files."
            )
        missing = largest - rank
        lora[module] = (F.pad(pair["A"], (0, 0, 0, missing)), F.pad(scale * pair["B"], (0, missing)))
    return lora


def rank_and_scale(config: LoraConfig, module: str) -> tuple[int, float]:
    """Return the rank that PEFT gives a module, and the factor of its B A."""
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)


@torch.no_grad()
def merge_lora(pipe: DiffusionPipeline, lora: Lora, name: object) -> None:
    """Add B A to the transformer's weights: sum in float32, round once to their type. Raises UserError if it does not fit."""
    layers = dict(pipe.transformer.named_modules())
    for module, (A, B) in lora.items():
        layer = layers.get(module)
        if not isinstance(layer, torch.nn.Linear) or layer.weight.shape != (B.shape[0], A.shape[1]):
            raise UserError(
                f"The adapter {name} does not fit the base model (at {module}): give its own with --pretrained-model."
            )
        layer.weight.copy_(layer.weight.float() + B @ A)
