"""adapter_config.json of adapters that anybody may have written: weights of a plain LoRA, and nothing else, are loaded."""

import dataclasses
import re

from peft import LoraConfig

LARGEST_RANK = 1024
NUMBER = (int, float)
PLAIN = {  # what may differ from PEFT's default, and of which type
    "r": int, "lora_alpha": NUMBER, "target_modules": list, "lora_dropout": NUMBER, "init_lora_weights": (bool, str),
    "rank_pattern": dict, "alpha_pattern": dict, "use_rslora": bool, "use_dora": bool, "fan_in_fan_out": bool, "inference_mode": bool,
}  # fmt: skip
PATTERN = re.compile(
    r"[\w.^$\\|\[\]-]+([*+?][\w.^$\\|\[\]-]*){0,3}", re.ASCII
)  # no groups, and few repetitions, so that searching ends
IGNORED = ("peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version")


def check_adapter_config(values: dict) -> None:
    """Raises ValueError unless these are the settings of a LoRA that PEFT loads without importing or computing anything more."""
    if values.get("peft_type") != "LORA":
        raise ValueError("it is no LoRA")
    defaults = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    for key, value in values.items():
        if key in PLAIN:
            if not isinstance(value, PLAIN[key]):
                raise ValueError(f"its {key} is {str(value)[:100]!r}")
        elif key in defaults and key not in IGNORED and value and value != defaults[key]:
            raise ValueError(f"it sets {key}, which is more than a plain LoRA needs")
    if values.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise ValueError("its init_lora_weights would change the base model")
    if not all(isinstance(name, str) for name in values.get("target_modules", ())):
        raise ValueError("its target_modules are no names")
    check_patterns(values)
    check_numbers(values)


def check_patterns(values: dict) -> None:
    """Raises ValueError for a key of rank_pattern or alpha_pattern that PEFT could not search for, or not in reasonable time."""
    for pattern in (*values.get("rank_pattern", {}), *values.get("alpha_pattern", {})):
        try:
            if not PATTERN.fullmatch(pattern):
                raise ValueError("it is neither a name nor a simple expression")
            re.compile(pattern)
        except (re.error, ValueError) as error:
            raise ValueError(f"its pattern {pattern[:100]!r} cannot be used: {error}") from error


def check_numbers(values: dict) -> None:
    ranks = [values.get("r", 8), *values.get("rank_pattern", {}).values()]
    if not all(isinstance(rank, int) and 1 <= rank <= LARGEST_RANK for rank in ranks):
        raise ValueError(f"a rank of it is not from 1 to {LARGEST_RANK}")
    alphas = [values.get("lora_alpha", 8), *values.get("alpha_pattern", {}).values()]
    if not all(isinstance(alpha, NUMBER) and abs(alpha) < 1e6 for alpha in alphas):
        raise ValueError("an alpha of it is no sane number")
    if not 0 <= values.get("lora_dropout", 0) < 1:
        raise ValueError("its lora_dropout is not from 0 to 1")
