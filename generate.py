"""A grid of pictures for one checkpoint, or for the base model.

python generate.py --preset tiny --out out.jpg
python generate.py --checkpoint runs/00000-combined-cfg_1p0 --out out.jpg
python generate.py --checkpoint https://huggingface.co/OWNER/NAME/tree/REVISION/FOLDER --out out.jpg
"""

import os
import sys

import torch

from fdfo.command_line import parse_generate_config
from fdfo.config import GenerateConfig, UserError
from fdfo.distributed import run_command_line, start_job
from fdfo.plan import plan_pictures
from fdfo.prompts import load_prompts

# Diffusers and PEFT take seconds to import: they come in the function below, so that --help and mistakes answer at once.


def main() -> None:
    config = parse_generate_config(sys.argv[1:])
    folder = config.out.absolute().parent
    if not folder.is_dir() or config.out.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"There is no folder {folder}, or {config.out} cannot be written there: give another --out.")
    generate(config)


def generate(config: GenerateConfig) -> None:
    """Draws the pictures and saves the sheet."""
    from fdfo.checkpoint import drawing_settings, find_checkpoint, guidance_warning
    from fdfo.hub import fetch_prompt_set
    from fdfo.pictures import draw_pictures, encode_for_pictures, load_for_pictures
    from fdfo.sheets import grid_sheet

    file_prompts = load_prompts(fetch_prompt_set(config.prompt_file)) if config.prompt_file else []
    checkpoint = find_checkpoint(config.checkpoint) if config.checkpoint else None
    plan = plan_pictures(config, *drawing_settings(checkpoint))
    prompts = list(config.prompts) or file_prompts or load_prompts(plan.prompt_set)[:15]
    with start_job() as job:
        if job.world_size > 1:
            raise UserError("generate.py runs as one process: start it with python, not with torchrun.")
        model = load_for_pictures(plan, checkpoint.folder if checkpoint else None, job.device)
        rows = [row for row in range(len(prompts)) for _ in range(config.grid_cols * config.grid_rows)]
        seeds = [config.seed + i for i in range(len(rows))]
        print(f"{len(rows)} pictures by {plan.model}, {plan.pictures}", flush=True)
        if checkpoint and (warning := guidance_warning(checkpoint, plan.pictures.guidance)):
            print(warning, flush=True)
        text = encode_for_pictures(model, prompts)
        pictures = torch.cat(list(draw_pictures(model, text, rows, seeds, plan.pictures)))
    sheet = grid_sheet(prompts, pictures, config.columns, config.grid_cols, config.grid_rows)
    try:
        sheet.save(config.out)
    except OSError as error:
        raise UserError(f"{config.out} cannot be written ({error}): a large grid needs .png, a full disk needs room.") from error
    print(f"pictures: {config.out}")


if __name__ == "__main__":
    run_command_line(main)
