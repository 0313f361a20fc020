"""Write a checkpoint for use elsewhere: as a LoRA that diffusers loads, or merged into a whole pipeline.

python -m fdfo.export runs/00000-combined-cfg_1p0 --lora my_lora
python -m fdfo.export runs/00000-combined-cfg_1p0 --lora my_lora --format sdnext
python -m fdfo.export runs/00000-combined-cfg_1p0 --merge my_pipeline
python -m fdfo.export https://huggingface.co/OWNER/NAME/tree/REVISION/FOLDER --lora my_lora
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fdfo.config.command_line import parse_export_config
from fdfo.config.errors import UserError
from fdfo.config.presets import PRESETS
from fdfo.config.tool_options import ExportConfig
from fdfo.config.train_options import SD35_MEDIUM
from fdfo.distributed.launch import run_command_line
from fdfo.storage.atomic_files import atomic_folder

if TYPE_CHECKING:
    from fdfo.run_folder.find_checkpoint import Checkpoint
    from fdfo.run_folder.lora_file import Lora
    from fdfo.run_folder.model_card import Origin

WORKFLOW = Path(__file__).parent / "comfyui_workflow.json"
# Diffusers and PEFT take seconds to import. They are imported in the functions below, so that --help and mistakes answer at once.


def main() -> None:
    export(parse_export_config(sys.argv[1:]))


def export(config: ExportConfig) -> None:
    """Write the LoRA or the pipeline, with its model card. Raises UserError."""
    from fdfo.run_folder.find_checkpoint import CARD, find_checkpoint
    from fdfo.run_folder.lora_file import SDNEXT_FILE, read_lora, write_lora, write_sdnext_lora
    from fdfo.run_folder.model_card import model_card
    from fdfo.storage.hub import LORA_FILE

    checkpoint = find_checkpoint(config.checkpoint)
    lora, out = read_lora(checkpoint.adapter), config.merge or config.lora
    origin = find_origin(config, checkpoint, lora)
    with new_folder(out) as folder:
        if config.merge is not None:
            write_pipeline(folder, config, origin, lora)
        elif config.format == "sdnext":
            write_sdnext_lora(folder, lora)
        else:
            write_lora(folder, lora)
            write_workflow(folder, origin)
        card = model_card(origin, config.merge is not None, SDNEXT_FILE if config.format == "sdnext" else LORA_FILE)
        (folder / CARD).write_text(card, encoding="utf-8")
    print(f"{checkpoint.label}: {out}", flush=True)


def find_origin(config: ExportConfig, checkpoint: "Checkpoint", lora: "Lora") -> "Origin":
    """Return what is known of the adapter: from its run's config, else from its folder's name and the flags."""
    from fdfo.model.families.registry import FAMILIES, family_of_layers
    from fdfo.run_folder.find_checkpoint import CHECKPOINT_NAME, epochs_and_steps, saved_config, trained_guidance
    from fdfo.run_folder.model_card import Origin

    saved = saved_config(checkpoint)
    settings = saved or PRESETS[config.preset]
    base = config.pretrained_model or settings.pretrained_model
    family = family_of_layers(lora)
    if family is None or any(base in other.licences for other in FAMILIES.values() if other is not family):
        raise UserError(f"{config.checkpoint} does not fit {base}: name its own base model with --preset or --pretrained-model.")
    named = CHECKPOINT_NAME.fullmatch(checkpoint.folder.name)
    epochs, steps = epochs_and_steps(checkpoint.folder) if named else (None, 0)
    return Origin(family, base, settings, saved is not None, trained_guidance(checkpoint), epochs, steps)


def write_pipeline(folder: Path, config: ExportConfig, origin: "Origin", lora: "Lora") -> None:
    """Write the whole pipeline, with the LoRA merged into its transformer."""
    from fdfo.model.adapted_pipeline import COMPUTE_TYPES
    from fdfo.model.families.registry import check_same_family, load_family
    from fdfo.run_folder.lora_file import merge_lora
    from fdfo.run_folder.model_card import public_name

    default = "fp32" if origin.settings.precision == "fp32" else "bf16"
    family = load_family(origin.base, COMPUTE_TYPES[config.dtype or default])
    check_same_family(family, lora, config.checkpoint, origin.base)
    pipe = family.pipe
    merge_lora(pipe, lora, config.checkpoint)
    for part in (pipe, pipe.transformer, pipe.vae):
        part.register_to_config(_name_or_path=public_name(origin.base))  # not the path of a folder on this machine
    pipe.save_pretrained(folder)


def write_workflow(folder: Path, origin: "Origin") -> None:
    """Write a workflow that draws with the LoRA of Stable Diffusion 3.5 Medium in ComfyUI, with the guidance of its training."""
    if origin.base != SD35_MEDIUM:
        return
    workflow, sample = json.loads(WORKFLOW.read_text(encoding="utf-8")), origin.settings.sample
    workflow["6"]["inputs"] |= {"width": sample.resolution, "height": sample.resolution}
    workflow["7"]["inputs"] |= {"steps": sample.num_solver_steps, "cfg": 1.0 if origin.guidance is None else origin.guidance}
    (folder / WORKFLOW.name).write_text(json.dumps(workflow, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield the folder to fill; it appears whole or not at all. Raises UserError if it cannot be written."""
    from safetensors import SafetensorError

    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(out) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written ({error}): make room, or give the name of another new folder.") from error


if __name__ == "__main__":
    run_command_line(main)
