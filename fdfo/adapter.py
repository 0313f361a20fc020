"""A LoRA on an SD3 transformer: which modules it binds to, its files, and that it binds to exactly those (METHOD.md 4)."""

import json
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from fdfo.config import UserError
from fdfo.hub import ADAPTER, check_adapter_files

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def lora_targets(transformer: SD3Transformer2DModel) -> list[str]:
    """Full names of the joint attention's linear layers; the last block has no to_add_out, attn2 is not adapted."""
    blocks = range(transformer.config.num_layers)
    names = [f"transformer_blocks.{block}.attn.{target}" for block in blocks for target in LORA_TARGETS]
    return names[:-1]


def attach_lora(transformer: SD3Transformer2DModel, config: LoraConfig, name: str) -> PeftModel:
    """A new float32 LoRA on the transformer of the model called name. Raises UserError unless it binds to the lora_targets."""
    expected = set(lora_targets(transformer))
    try:
        peft = get_peft_model(transformer, config)
    except ValueError as error:
        raise UserError(f"The LoRA binds to no module of {name}: give an adapter of an SD3 transformer.") from error
    found = {module_name for module_name, module in transformer.named_modules() if hasattr(module, "lora_A")}
    if found != expected:
        lines = [f"  missing {module_name}" for module_name in sorted(expected - found)]
        lines += [f"  unexpected {module_name}" for module_name in sorted(found - expected)]
        raise UserError(
            f"The LoRA binds to {len(found)} modules of {name}, the architecture has {len(expected)}: give an adapter of the joint "
            "attention's linear layers. Differences:\n" + "\n".join(lines)
        )
    assert all(parameter.dtype == torch.float32 for key, parameter in transformer.named_parameters() if "lora_" in key)
    return peft


def fill_lora(peft: PeftModel, folder: Path, name: str) -> None:
    """Gives a LoRA on the model called name the weights of an adapter folder. Raises UserError if they do not fit, or are not finite."""
    tensors = read_adapter(folder)
    try:
        result = set_peft_model_state_dict(peft, tensors)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"The adapter in {folder} does not fit {name} ({reason}): give its own base model.") from error
    missing = [key for key in result.missing_keys if "lora_" in key]
    if result.unexpected_keys or missing:
        strange = (result.unexpected_keys + missing)[0]
        raise UserError(f"The adapter in {folder} does not fit {name} (at {strange}): give its own base model.")


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder. Raises UserError where they cannot be read, or are not finite."""
    try:
        tensors = load_file(folder / ADAPTER)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}/{ADAPTER} cannot be read ({error}): restore the file, or give another adapter.") from error
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"The adapter in {folder} has numbers that are not finite: give another checkpoint.")
    return tensors


def read_adapter_config(folder: Path) -> LoraConfig:
    """The LoraConfig of an adapter folder, its dropout taken out: neither pictures nor this method's training know any.

    Raises UserError if the folder holds no LoRA adapter.
    """
    check_adapter_files(folder, folder)
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{folder}/adapter_config.json is not the configuration of a PEFT adapter: restore the file.") from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"The adapter in {folder} is no LoRA: give a LoRA adapter.")
    config.inference_mode, config.base_model_name_or_path, config.lora_dropout = False, None, 0.0
    return config
