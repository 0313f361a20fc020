"""A LoRA on the transformer: that it binds to exactly the layers that the family names (docs/method.md 4)."""

import dataclasses
import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn

from fdfo.config.errors import UserError
from fdfo.storage.adapters import Adapter

BLOCK_NUMBER, SHOWN_KINDS = re.compile(r"(?:(?<=blocks[._])|(?<=layers[._])|(?<=refiner[._]))\d+"), 12


def completed(transformer: nn.Module, targets: list[str], adapter: Adapter, source: Path) -> tuple[LoraConfig, set[str]]:
    """Return the settings that bind an adapter to all targets, and which of them it leaves out: those start with B = 0.

    Raises UserError, naming them, if it has layers that are not trained.
    """
    names = [name for name, _ in transformer.named_modules()]
    bound = {name for name in names if any(f".{name}".endswith(f".{target}") for target in adapter.config.target_modules)}
    strange, missing = (bound | adapter.modules) - set(targets), set(targets) - bound
    if strange:
        kinds = sorted({BLOCK_NUMBER.sub("*", name) for name in strange})
        advice = (
            "take them out"
            if any(name.startswith(("text_encoder", "lora_te")) for name in strange)
            else f"merge it into a pipeline with `python -m fdfo.export {source} --merge FOLDER`, then train with --pretrained-model FOLDER"
        )
        shown = ", ".join(kinds[:SHOWN_KINDS]) + (", ..." if len(kinds) > SHOWN_KINDS else "")
        raise UserError(f"The LoRA {source} has {len(strange)} layers that FDFO does not train ({shown}): {advice}.")
    if not missing or not bound:
        return adapter.config, set()
    return dataclasses.replace(adapter.config, target_modules=targets, init_lora_weights="gaussian"), missing


def attach_lora(transformer: nn.Module, targets: list[str], config: LoraConfig, name: str) -> PeftModel:
    """Put a new float32 LoRA on the transformer of the model called name. Raises UserError unless it binds to the targets."""
    expected = set(targets)
    try:
        peft = get_peft_model(transformer, config)
    except ValueError as error:
        raise UserError(f"The LoRA binds to no module of {name}: give an adapter of its own architecture.") from error
    found = {module_name for module_name, module in transformer.named_modules() if hasattr(module, "lora_A")}
    if found != expected:
        lines = [f"  missing {module_name}" for module_name in sorted(expected - found)]
        lines += [f"  unexpected {module_name}" for module_name in sorted(found - expected)]
        raise UserError(
            f"The LoRA binds to {len(found)} modules of {name}, the architecture has {len(expected)}: give an adapter of the "
            "attention's linear layers. Differences:\n" + "\n".join(lines)
        )
    assert all(parameter.dtype == torch.float32 for key, parameter in transformer.named_parameters() if "lora_" in key)
    return peft


def fill_lora(peft: PeftModel, tensors: dict[str, torch.Tensor], fresh: set[str], source: Path, name: str) -> None:
    """Load an adapter's tensors into a LoRA on the model called name; layers named in fresh keep their start.

    Raises UserError, naming the source, if they do not fit.
    """
    try:
        result = set_peft_model_state_dict(peft, tensors)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"The adapter in {source} does not fit {name} ({reason}): give its own base model.") from error
    missing = [
        key
        for key in result.missing_keys
        if "lora_" in key and key.removeprefix("base_model.model.").partition(".lora_")[0] not in fresh
    ]
    if result.unexpected_keys or missing:
        strange = (result.unexpected_keys + missing)[0]
        raise UserError(f"The adapter in {source} does not fit {name} (at {strange}): give its own base model.")
