"""Writes a checkpoint for use elsewhere: as a LoRA that diffusers loads, or merged into a whole pipeline.

python -m fdfo.export runs/00000-combined-cfg_1p0 --lora my_lora
python -m fdfo.export runs/00000-combined-cfg_1p0 --merge my_pipeline
python -m fdfo.export https://huggingface.co/OWNER/NAME/tree/REVISION/FOLDER --push-to-hub ME/MY_LORA
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fdfo.command_line import parse_export_config
from fdfo.config import PRESETS, ExportConfig, UserError
from fdfo.distributed import run_command_line
from fdfo.manifest import whole_folder

if TYPE_CHECKING:
    from fdfo.checkpoint import Checkpoint
    from fdfo.lora_file import Lora
    from fdfo.model_card import Origin

# Diffusers and PEFT take seconds to import: they come in the functions below, so that --help and mistakes answer at once.


def main() -> None:
    export(parse_export_config(sys.argv[1:]))


def export(config: ExportConfig) -> None:
    """Writes the LoRA or the pipeline, with its card, and uploads it where that is asked for."""
    from fdfo.checkpoint import find_checkpoint
    from fdfo.hub import open_repository, push_folder
    from fdfo.lora_file import read_lora

    checkpoint = find_checkpoint(config.checkpoint)
    origin, lora = find_origin(config, checkpoint), read_lora(checkpoint.folder)
    if config.push_to_hub is not None:  # before the work, since it may be refused
        address = open_repository(config.push_to_hub, config.public)
    with tempfile.TemporaryDirectory() as scratch:
        out = config.merge or config.lora or Path(scratch) / "lora"
        if config.merge is not None:
            export_pipeline(config, checkpoint, origin, lora)
        else:
            export_lora(config, origin, lora, out)
        if out.parent != Path(scratch):
            print(f"{checkpoint.label}: {out}", flush=True)
        if config.push_to_hub is not None:
            push_folder(out, config.push_to_hub)
            print(f"{checkpoint.label}: {address}", flush=True)


def find_origin(config: ExportConfig, checkpoint: "Checkpoint") -> "Origin":
    """What is known of the adapter: from its run's config, else from its folder's name and the flags."""
    from fdfo.checkpoint import CHECKPOINT_NAME, saved_config, trained_guidance
    from fdfo.model_card import Origin

    saved = saved_config(checkpoint)
    settings = saved or PRESETS[config.preset]
    base = config.pretrained_model or settings.pretrained_model
    place = CHECKPOINT_NAME.search(checkpoint.folder.name)
    epochs, steps = (int(place[1]), int(place[2] or 0)) if place else (None, 0)
    return Origin(base, settings, saved is not None, trained_guidance(checkpoint), epochs, steps)


def export_lora(config: ExportConfig, origin: "Origin", lora: "Lora", out: Path) -> None:
    """A folder with what load_lora_weights reads, and the model card."""
    from fdfo.checkpoint import CARD
    from fdfo.lora_file import write_lora
    from fdfo.model_card import PLACE, model_card

    with new_folder(out) as folder:
        write_lora(folder, lora)
        (folder / CARD).write_text(model_card(origin, False, config.push_to_hub or PLACE), encoding="utf-8")


def export_pipeline(config: ExportConfig, checkpoint: "Checkpoint", origin: "Origin", lora: "Lora") -> None:
    """A folder with the whole pipeline, the adapter merged into its transformer, and the model card."""
    from fdfo.checkpoint import CARD
    from fdfo.hub import load_pipeline
    from fdfo.lora_file import merge_lora
    from fdfo.model import COMPUTE_TYPES
    from fdfo.model_card import PLACE, model_card, public_name

    default = "fp32" if origin.settings.precision == "fp32" else "bf16"
    pipe = load_pipeline(origin.base, COMPUTE_TYPES[config.dtype or default])
    merge_lora(pipe, lora, checkpoint.folder)
    for part in (pipe, pipe.transformer, pipe.vae):
        part.register_to_config(_name_or_path=public_name(origin.base))  # not the path of a folder on this machine
    with new_folder(config.merge) as folder:
        pipe.save_pretrained(folder)
        (folder / CARD).write_text(model_card(origin, True, config.push_to_hub or PLACE), encoding="utf-8")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """The folder to fill, there whole or not at all. Raises UserError when it cannot be written."""
    from safetensors import SafetensorError

    try:
        with whole_folder(out) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written ({error}): make room, or give the name of another new folder.") from error


if __name__ == "__main__":
    run_command_line(main)
