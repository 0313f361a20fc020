"""A LoRA on an SD3 transformer: which modules it binds to, its files, and that it binds to exactly those (docs/method.md 4)."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from fdfo.config.errors import UserError
from fdfo.storage.atomic_files import read_json
from fdfo.storage.hub import ADAPTER, ADAPTER_CONFIG, check_adapter_files

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
Rank = Annotated[int, Field(ge=1, le=1024)]


@dataclass(frozen=True)
class PlainLora:
    """All that is read of an adapter_config.json, which may be anybody's."""

    __pydantic_config__ = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    peft_type: Literal["LORA"]
    target_modules: list[str]
    r: Rank = 8
    lora_alpha: int | float = 8
    rank_pattern: dict[str, Rank] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    use_rslora: bool = False
    init_lora_weights: bool | Literal["gaussian"] = True  # others would change the base model


IGNORED = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "lora_dropout", "peft_version", "revision", "task_type",
}  # fmt: skip


def read_adapter_config(folder: Path) -> LoraConfig:
    """Read the LoraConfig of an adapter folder. Dropout is set to 0; neither sampling nor training uses it.

    Raises UserError if the folder holds no LoRA adapter, or one that is more than W + s B A.
    """
    check_adapter_files(folder, folder)
    try:
        values = read_json(folder / ADAPTER_CONFIG)
        plain = TypeAdapter(PlainLora).validate_json(json.dumps(values))
        defaults = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
        for name in defaults.keys() & values.keys() - IGNORED - vars(plain).keys():
            if values[name] and values[name] != defaults[name]:
                raise ValueError(f"it sets {name}, which is more than a plain LoRA needs")
        for pattern in (*plain.rank_pattern, *plain.alpha_pattern):
            re.compile(pattern)
    except (OSError, ValueError, re.error) as error:
        if isinstance(error, ValidationError):
            error = f"its {'.'.join(map(str, error.errors()[0]['loc']))} is wrong"
        raise UserError(
            f"{folder}/{ADAPTER_CONFIG} is not the configuration of a plain LoRA adapter of PEFT ({error}): restore the file, or "
            "give another adapter."
        ) from None
    return LoraConfig(**{name: value for name, value in dataclasses.asdict(plain).items() if name != "peft_type"})


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of an adapter folder. Raises UserError if they cannot be read, or are not finite."""
    try:
        tensors = load_file(folder / ADAPTER)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}/{ADAPTER} cannot be read ({error}): restore the file, or give another adapter.") from error
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"The adapter in {folder} has numbers that are not finite: give another checkpoint.")
    return tensors


def lora_targets(transformer: SD3Transformer2DModel) -> list[str]:
    """Return full names of the joint attention's linear layers; the last block has no to_add_out, attn2 is not adapted."""
    blocks = range(transformer.config.num_layers)
    names = [f"transformer_blocks.{block}.attn.{target}" for block in blocks for target in LORA_TARGETS]
    return names[:-1]


def attach_lora(transformer: SD3Transformer2DModel, config: LoraConfig, name: str) -> PeftModel:
    """Put a new float32 LoRA on the transformer of the model called name. Raises UserError unless it binds to the lora_targets."""
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
    """Load the weights of an adapter folder into a LoRA on the model called name. Raises UserError if they do not fit."""
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
