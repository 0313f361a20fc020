"""Reads LoRA adapters: PEFT's folders, and the files of other programs, as PEFT's settings and tensors (docs/method.md 4)."""

import dataclasses
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from peft import LoraConfig
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from fdfo.config.errors import UserError
from fdfo.storage.atomic_files import read_json
from fdfo.storage.foreign_lora import METADATA, LoraLayer, read_lora_file
from fdfo.storage.hub import ADAPTER, ADAPTER_CONFIG, check_adapter_files

PEFT_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
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


@dataclass(frozen=True)
class Adapter:
    """A LoRA as it was read: PEFT's settings, and its tensors under the names of a PEFT adapter file."""

    config: LoraConfig
    tensors: dict[str, torch.Tensor]

    @property
    def modules(self) -> set[str]:
        """Full names of the layers that it has tensors for."""
        return {match[1] for key in self.tensors if (match := PEFT_KEY.fullmatch(key))}


def read_lora_adapter(source: Path) -> Adapter:
    """Read the adapter in a folder of PEFT's, or in the LoRA file of another program. Raises UserError."""
    if not source.is_file():
        return Adapter(read_adapter_config(source), read_adapter(source))
    file = read_lora_file(source)
    tensors = {
        f"base_model.model.{module}.lora_{part}.weight": tensor
        for module, layer in file.layers.items()
        for part, tensor in (("A", layer.A), ("B", layer.B))
    }
    check_finite(tensors, source)
    if file.settings is not None:
        return Adapter(plain_config(file.settings, f"The {METADATA} of {source}"), tensors)
    values = config_of_shapes(file.layers)
    return Adapter(plain_config(values, str(source)), tensors)


def config_of_shapes(layers: dict[str, LoraLayer]) -> dict:
    """Return the settings of a LoRA without any: the ranks are those of its tensors, and an alpha that it does not give is the rank.

    The commonest rank and alpha are those of the LoRA; layers with others are named.
    """
    numbers = {module: (len(layer.A), whole(layer.alpha or len(layer.A))) for module, layer in layers.items()}
    rank, alpha = Counter(numbers.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "target_modules": list(layers),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(module)}": own for module, (own, _) in numbers.items() if own != rank},
        "alpha_pattern": {f"^{re.escape(module)}": own for module, (_, own) in numbers.items() if own != alpha},
    }


def whole(number: float) -> int | float:
    return int(number) if number == int(number) else number


def read_adapter_config(folder: Path) -> LoraConfig:
    """Read the LoraConfig of an adapter folder. Dropout is set to 0; neither sampling nor training uses it.

    Raises UserError if the folder holds no LoRA adapter, or one that is more than W + s B A.
    """
    check_adapter_files(folder, folder)
    try:
        values = read_json(folder / ADAPTER_CONFIG)
    except (OSError, ValueError) as error:
        raise no_plain_lora(f"{folder}/{ADAPTER_CONFIG}", error) from None
    return plain_config(values, f"{folder}/{ADAPTER_CONFIG}")


def plain_config(values: object, source: str) -> LoraConfig:
    """Return the LoraConfig of PEFT's settings, read from the source. Raises UserError unless they are those of W + s B A."""
    try:
        plain = TypeAdapter(PlainLora).validate_json(json.dumps(values))
        defaults = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
        for name in defaults.keys() & values.keys() - IGNORED - vars(plain).keys():
            if values[name] and values[name] != defaults[name]:
                raise ValueError(f"it sets {name}, which is more than a plain LoRA needs")
        for pattern in (*plain.rank_pattern, *plain.alpha_pattern):
            re.compile(pattern)
    except (ValueError, re.error) as error:
        if isinstance(error, ValidationError):
            error = f"its {'.'.join(map(str, error.errors()[0]['loc']))} is wrong"
        raise no_plain_lora(source, error) from None
    return LoraConfig(**{name: value for name, value in dataclasses.asdict(plain).items() if name != "peft_type"})


def no_plain_lora(source: str, error: object) -> UserError:
    return UserError(
        f"{source} is not the configuration of a plain LoRA adapter of PEFT ({error}): restore the file, or give another adapter."
    )


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of an adapter folder. Raises UserError if they cannot be read, or are not finite."""
    try:
        tensors = load_file(folder / ADAPTER)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}/{ADAPTER} cannot be read ({error}): restore the file, or give another adapter.") from error
    check_finite(tensors, folder)
    return tensors


def check_finite(tensors: dict[str, torch.Tensor], source: Path) -> None:
    """Raise UserError for numbers that are not finite."""
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"The adapter in {source} has numbers that are not finite: give another checkpoint.")
