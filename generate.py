"""Draw a grid of images with a checkpoint, or with the base model.

python generate.py --preset tiny --out out.jpg
python generate.py --checkpoint runs/00000-combined-cfg_1p0 --out out.jpg
python generate.py --checkpoint https://huggingface.co/OWNER/NAME/tree/REVISION/FOLDER --out out.jpg
"""

import os
import sys

import torch

from fdfo.config.command_line import parse_generate_config
from fdfo.config.errors import UserError
from fdfo.config.plan import plan_images
from fdfo.config.tool_options import GenerateConfig
from fdfo.distributed.launch import run_command_line, start_job
from fdfo.storage.atomic_files import write_bytes
from fdfo.storage.prompts import load_prompts

# Diffusers and PEFT take seconds to import. They are imported in the function below, so that --help and mistakes answer at once.


def main() -> None:
    config = parse_generate_config(sys.argv[1:])
    folder = config.out.absolute().parent
    if not folder.is_dir() or config.out.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"There is no folder {folder}, or {config.out} cannot be written there: give another --out.")
    generate(config)


def generate(config: GenerateConfig) -> None:
    """Draw the images and save the sheet. Raises UserError."""
    from fdfo.model.images import draw_images, encode_for_images, load_for_images
    from fdfo.report.sheets import encoded, grid_sheet
    from fdfo.run_folder.find_checkpoint import find_checkpoint, guidance_warning, saved_config, trained_guidance
    from fdfo.storage.hub import load_prompt_set

    file_prompts = load_prompt_set(config.prompt_file) if config.prompt_file else []
    checkpoint = find_checkpoint(config.checkpoint) if config.checkpoint else None
    plan = plan_images(config, saved_config(checkpoint), trained_guidance(checkpoint))
    prompts = list(config.prompts) or file_prompts or load_prompts(plan.prompt_set)[:15]
    with start_job() as job:
        if job.world_size > 1:
            raise UserError("generate.py runs as one process: start it with python, not with torchrun.")
        model = load_for_images(plan, checkpoint.adapter if checkpoint else None, job.device)
        rows = [row for row in range(len(prompts)) for _ in range(config.grid_cols * config.grid_rows)]
        seeds = [config.seed + i for i in range(len(rows))]
        print(f"{len(rows)} images by {plan.model}, {plan.settings.describe()}", flush=True)
        if checkpoint and (warning := guidance_warning(checkpoint, plan.settings.guidance)):
            print(warning, flush=True)
        text = encode_for_images(model, prompts)
        images = torch.cat(list(draw_images(model, text, rows, seeds, plan.settings)))
    sheet = grid_sheet(prompts, images, config.columns, config.grid_cols, config.grid_rows)
    try:
        write_bytes(config.out, encoded(sheet, config.out.suffix))
    except OSError as error:
        raise UserError(f"{config.out} cannot be written ({error}): a large grid needs .png, a full disk needs room.") from error
    print(f"images: {config.out}")


if __name__ == "__main__":
    run_command_line(main)
