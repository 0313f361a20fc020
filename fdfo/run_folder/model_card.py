"""Writes the model card of an adapter: what it is, how it was trained, how to draw with it, and its licence."""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader

from fdfo.config.errors import UserError
from fdfo.config.plan import plan_churn
from fdfo.config.presets import HUMAN
from fdfo.config.train_options import SD35_MEDIUM, TrainConfig
from fdfo.distributed.machine import versions
from fdfo.run_folder.lora_file import SDNEXT_FILE
from fdfo.storage.hub import BUNDLED_MODELS, LORA_FILE
from fdfo.tiny import TEXT_TOKENS
from rewards.presets import REWARD_PRESETS

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
LICENCES = {
    SD35_MEDIUM: {
        "license": "other",
        "license_name": "stabilityai-ai-community",
        "license_link": f"https://huggingface.co/{SD35_MEDIUM}/blob/main/LICENSE.md",
    },
    "tiny": {"license": "apache-2.0"},
}


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from, as far as it is known."""

    base: str  # the pipeline it was trained on: hub id, folder, or "tiny"
    settings: TrainConfig  # of its run, or of the preset if the run is unknown
    known_run: bool
    guidance: float | None  # it was trained with
    epochs: int | None
    steps: int = 0  # further optimizer steps


def model_card(origin: Origin, merged: bool, lora_file: str = LORA_FILE) -> str:
    """Return README.md for a LoRA file, or for a pipeline with the LoRA merged in, by the template model_card.md.

    The text depends on the checkpoint alone: no times, no paths, nothing that a resume may change. Raises UserError.
    """
    config, bundled, base = origin.settings, origin.base in BUNDLED_MODELS, public_name(origin.base)
    options = {
        "guidance_scale": 1.0 if origin.guidance is None else origin.guidance,
        "num_inference_steps": config.sample.num_solver_steps,
        "height": config.sample.resolution,
        "width": config.sample.resolution,
    } | ({"max_sequence_length": TEXT_TOKENS} if bundled else {})  # fmt: skip
    churn = ", ".join(f"{name} {value:g}" for name, value in plan_churn(config.churn).items())
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, loader=FileSystemLoader(Path(__file__).parent)
    )
    return environment.get_template("model_card.md").render(
        vars(origin), merged=merged, base=base, header=header(origin, merged), reward=reward_text(config) if origin.known_run else "",
        path=f"fdfo/tiny/{BUNDLED_MODELS[origin.base].name}" if bundled else base, churn=churn,
        lora_file=lora_file, for_sdnext=lora_file == SDNEXT_FILE,
        prompt="a red circle on a white background" if bundled else "a red fox asleep in fresh snow",
        options=", ".join(f"{name}={value}" for name, value in options.items()), prompt_set=Path(config.prompt_set).name,
        versions=", ".join(f"{name} {number}" for name, number in versions().items()), licence=licence_text(origin),
    )  # fmt: skip


def licence_text(origin: Origin) -> str:
    """Return what the card says of the licence."""
    if not origin.known_run:
        return "Those of the base model and of the adapter that this was made from hold for these weights, too."
    if origin.base == SD35_MEDIUM:
        return (
            f"Powered by Stability AI. Derived from [{SD35_MEDIUM}](https://huggingface.co/{SD35_MEDIUM}). This Stability AI Model is "
            f"licensed under the [Stability AI Community License]({LICENCES[SD35_MEDIUM]['license_link']}), Copyright © Stability AI "
            "Ltd. All Rights Reserved. That licence holds for these weights, too."
        )
    return "Apache-2.0, as the base model." if origin.base == "tiny" else "That of the base model holds for these weights, too."


def public_name(base: str) -> str:
    """Return the base model's name without the path of a folder."""
    return base if is_hub_id(base) else Path(base).name


def is_hub_id(base: str) -> bool:
    return HUB_ID.fullmatch(base) is not None and not Path(base).is_dir()


def header(origin: Origin, merged: bool) -> str:
    """Return the YAML that the hub reads. A base model that is not on the hub has no entry; a foreign adapter may have its own licence."""
    base = (
        {"base_model": origin.base, "base_model_relation": "finetune" if merged else "adapter"} if is_hub_id(origin.base) else {}
    )
    tags = ["text-to-image", "fdfo"] if merged else ["lora", "text-to-image", "fdfo"]
    licence = LICENCES.get(origin.base, {}) if origin.known_run else {}
    return ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=tags, **base, **licence).to_yaml()


def reward_text(config: TrainConfig) -> str:
    """Return scorers and weights as the config names them, importing none: the config may be anybody's. Raises UserError."""
    try:
        pairs = [spec.rpartition("=")[::2] for spec in config.reward_specs] or REWARD_PRESETS[config.reward_preset].items()
        told = {HUMAN: f"{HUMAN} (people chose the better of two images)"}
        return " + ".join(f"{float(weight):g} {told.get(name, name)}" for name, weight in pairs)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"The run's config.json names a reward that this version does not know ({error}): restore the file."
        ) from error
