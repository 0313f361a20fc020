"""The model card of an exported adapter: what it is, how it was trained, how to draw with it, and under which licence."""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData

from fdfo.config import SD35_MEDIUM, TrainConfig, UserError
from fdfo.hub import BUNDLED_MODELS
from fdfo.lora_file import LORA_FILE
from fdfo.manifest import is_folder
from fdfo.meters import versions
from fdfo.plan import plan_churn
from fdfo.tiny import TEXT_TOKENS
from rewards import REWARD_PRESETS

PLACE = "FOLDER"  # stands in a card for where its files are, until they are uploaded
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
LICENCES = {
    SD35_MEDIUM: {
        "license": "other",
        "license_name": "stabilityai-ai-community",
        "license_link": f"https://huggingface.co/{SD35_MEDIUM}/blob/main/LICENSE.md",
    },
    "tiny": {"license": "apache-2.0"},
}
LICENCE_TEXTS = {
    SD35_MEDIUM: f"Powered by Stability AI. Derived from [{SD35_MEDIUM}](https://huggingface.co/{SD35_MEDIUM}), which is licensed under "
    f"the [Stability AI Community License](https://huggingface.co/{SD35_MEDIUM}/blob/main/LICENSE.md), Copyright © Stability AI Ltd. All "
    "Rights Reserved. That licence holds for these weights, too.",
    "tiny": "Apache-2.0, as the base model.",
}
TRAINED = (
    "Trained with FDFO, Finite Difference Flow Optimization ([arXiv 2603.12893](https://arxiv.org/abs/2603.12893)): online "
    "reinforcement learning of a text-to-image flow model with a reward.\n"
)
EXPORTED = "Made from a PEFT adapter by `fdfo.export`; how it was trained stands where it was published.\n"


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from, as far as that is known."""

    base: str  # the pipeline it was trained on: hub id, folder, or "tiny"
    settings: TrainConfig  # of its run; of the preset where the run is not known
    known_run: bool
    guidance: float | None  # that it was trained with
    epochs: int | None
    steps: int = 0  # further optimizer steps


def model_card(origin: Origin, merged: bool, place: str = PLACE) -> str:
    """README.md for a LoRA, or for a pipeline with the adapter merged in, in a folder or under a name on the hub.

    The same text for the same checkpoint: no times, no paths, nothing that a resumed run may change without changing its numbers.
    """
    what = "{base} with a merged LoRA" if merged else "LoRA for {base}"
    parts = [
        f"---\n{header(origin, merged)}\n---\n",
        f"# {what.format(base=public_name(origin.base))}\n",
        TRAINED if origin.known_run else EXPORTED,
        facts(origin),
        f"## Use\n\n```python\n{code(origin, merged, place)}\n```\n",
        advice(merged),
    ]
    if origin.known_run:
        parts.append(f"## Settings of the run\n\n{settings_table(origin)}\n")
    parts.append("Written with " + ", ".join(f"{name} {number}" for name, number in versions().items()) + ".\n")
    parts.append(f"## Licence\n\n{licence_text(origin)}\n")
    return "\n".join(parts)


def licence_text(origin: Origin) -> str:
    if not origin.known_run:
        return "Those of the base model and of the adapter that this was made from hold for these weights, too."
    return LICENCE_TEXTS.get(origin.base, "That of the base model holds for these weights, too.")


def public_name(base: str) -> str:
    """The base model's name without the path of a folder."""
    return base if is_hub_id(base) else Path(base).name


def is_hub_id(base: str) -> bool:
    return HUB_ID.fullmatch(base) is not None and not is_folder(Path(base))


def header(origin: Origin, merged: bool) -> str:
    """The YAML that the hub reads. A base model that is not on the hub has no entry; an adapter of others may have its own licence."""
    base = (
        {"base_model": origin.base, "base_model_relation": "finetune" if merged else "adapter"} if is_hub_id(origin.base) else {}
    )
    tags = ["text-to-image", "fdfo"] if merged else ["lora", "text-to-image", "fdfo"]
    licence = LICENCES.get(origin.base, {}) if origin.known_run else {}
    return ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=tags, **base, **licence).to_yaml()


def facts(origin: Origin) -> str:
    """Base, reward, epochs and guidance as a list."""
    lines = [f"- Base model: {public_name(origin.base)}"]
    if origin.known_run:
        lines.append(f"- Reward: {reward_text(origin.settings)}")
    if origin.epochs is not None:
        pairs = f" of {origin.settings.total_pairs_per_epoch} pairs of pictures" if origin.known_run else ""
        steps = f", and {origin.steps} optimizer steps of the next" if origin.steps else ""
        lines.append(f"- Trained for {origin.epochs} epochs{pairs}{steps}")
    if origin.guidance is None:
        lines.append("- Guidance: sample with the `guidance_scale` that it was trained with; it is not known here")
    else:
        lines.append(f"- Guidance: trained with `guidance_scale={origin.guidance}`, and meant to be sampled with it")
    return "\n".join(lines) + "\n"


def reward_text(config: TrainConfig) -> str:
    """Scorers and weights as the config names them. Imports none of them: the config may be anybody's. Raises UserError."""
    try:
        pairs = [spec.rpartition("=")[::2] for spec in config.reward_specs] or REWARD_PRESETS[config.reward_preset].items()
        return " + ".join(f"{float(weight):g} {name}" for name, weight in pairs)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"The run's config.json names a reward that this version does not know ({error}): restore the file."
        ) from error


def code(origin: Origin, merged: bool, place: str) -> str:
    """Python that draws a picture as the run did, with diffusers alone."""
    settings, bundled = origin.settings, origin.base in BUNDLED_MODELS
    half = settings.precision != "fp32"
    base = f"fdfo/tiny/{BUNDLED_MODELS[origin.base].name}" if bundled else public_name(origin.base)
    prompt = "a red circle on a white background" if bundled else "a red fox asleep in fresh snow"
    options = {
        "guidance_scale": 1.0 if origin.guidance is None else origin.guidance,
        "num_inference_steps": settings.sample.num_solver_steps,
        "height": settings.sample.resolution,
        "width": settings.sample.resolution,
    } | ({"max_sequence_length": TEXT_TOKENS} if bundled else {})  # fmt: skip
    types = 'torch_dtype=torch.bfloat16).to("cuda")' if half else "torch_dtype=torch.float32)"
    lines = ["import torch", "from diffusers import StableDiffusion3Pipeline", ""]
    lines.append(f'pipe = StableDiffusion3Pipeline.from_pretrained("{place if merged else base}", {types}')
    if not merged:
        lines.append(f'pipe.load_lora_weights("{place}", weight_name="{LORA_FILE}")')
    lines.append(f'image = pipe("{prompt}", {", ".join(f"{name}={value}" for name, value in options.items())}).images[0]')
    return "\n".join(lines)


def advice(merged: bool) -> str:
    if merged:
        return "The adapter is part of the transformer's weights; there is nothing else to load.\n"
    return (
        f"`{LORA_FILE}` holds A and B of W + B A. The LoRA's scale (alpha / rank) is inside B and there are no alpha "
        "entries, so it is to be loaded with strength 1 everywhere.\n"
    )


def settings_table(origin: Origin) -> str:
    config = origin.settings
    churn = ", ".join(f"{name} {value:g}" for name, value in plan_churn(config.churn).items())
    rows = {
        "prompt set": Path(config.prompt_set).name,
        "seed": config.seed,
        "pairs an epoch, optimizer steps an epoch": f"{config.total_pairs_per_epoch}, {config.gradient_steps_per_epoch}",
        "solver steps, resolution, guidance": f"{config.sample.num_solver_steps}, {config.sample.resolution}, {config.sample.guidance_scale}",
        "churn": f"{config.churn.schedule} ({churn})",
        "learning rate, clip range, KL weight": f"{config.train.learning_rate}, {config.train.clip_range}, {config.train.kl_weight}",
        "LoRA rank, alpha": f"{config.lora_rank}, {config.lora_alpha}",
        "precision": config.precision,
    }
    return "\n".join(["| setting | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
