"""Scores of the pictures that a checkpoint, or the base model, draws for a prompt set.

python metrics.py --preset tiny --prompt-set tiny_heldout --num-prompts 256 --metrics scene scene_clip
torchrun --nproc_per_node=8 metrics.py --checkpoint URL_OR_FOLDER --prompt-set hpdv2 --num-prompts 3200 --metrics hpsv2 clip_h14
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

from fdfo.command_line import parse_metrics_config
from fdfo.config import MetricsConfig, UserError, config_to_dict
from fdfo.distributed import Job, exit_on_user_error, start_job
from fdfo.logger import versions
from fdfo.plan import plan_pictures
from fdfo.prompts import load_prompts
from rewards import build_scorer, check_scorer_name

# Diffusers and PEFT take seconds to import: they come in evaluate(), so that --help and mistakes answer at once.


def choose_prompts(config: MetricsConfig) -> list[str]:
    """The first prompts of the shuffled set (METHOD.md 5). Raises UserError when the set is too small."""
    prompts = load_prompts(config.prompt_set)
    if config.num_prompts > len(prompts):
        raise UserError(f"The prompt set {config.prompt_set} has {len(prompts)} prompts: lower --num-prompts to that or less.")
    order = np.arange(len(prompts))
    np.random.RandomState(config.prompt_seed).shuffle(order)
    return [prompts[i] for i in order[: config.num_prompts]]


def evaluate(job: Job, config: MetricsConfig) -> dict[str, list[float]]:
    """Scores of every metric for all pictures of the job, in the order of prompts, then repeats."""
    for metric in config.metrics:
        check_scorer_name(metric)
    prompts = choose_prompts(config)
    total = config.num_prompts * config.num_repeats
    if total < job.world_size:
        raise UserError(f"{total} pictures cannot feed {job.world_size} processes: start fewer.")
    from fdfo.checkpoint import find_checkpoint, saved_config
    from fdfo.evaluation import draw_pictures, load_for_pictures
    from fdfo.rollout import gather_scores

    checkpoint = job.on_main(lambda: find_checkpoint(config.checkpoint)) if config.checkpoint else None
    plan = plan_pictures(config, saved_config(checkpoint) if checkpoint else None)
    model = load_for_pictures(plan, checkpoint, job.device)
    own = job.share(total)
    mine = [prompts[i // config.num_repeats] for i in own]
    job.print(f"{total} pictures by {plan.model}, {plan.pictures}")
    images = draw_pictures(model, mine, [config.image_seed + i for i in own], plan.pictures)
    scores = {metric: build_scorer(metric, job, config.vlm_model).score(mine, images) for metric in config.metrics}
    return gather_scores(job, scores)


def main() -> None:
    argv = sys.argv[1:]
    with start_job() as job:
        config = parse_metrics_config(argv, quiet=not job.is_main)
        scores = evaluate(job, config)
        table = {name: {"mean": float(np.mean(v)), "standard_error": standard_error(v)} for name, v in scores.items()}
        for name, row in table.items():
            job.print(f"{name:20s} {row['mean']:10.4f} +- {row['standard_error']:.4f}")
        if config.out is not None:
            result = {"metrics": table, "config": config_to_dict(config), "versions": versions()}
            job.on_main(lambda: write_result(config.out, result))


def standard_error(values: list[float]) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def write_result(path: Path, result: dict) -> None:
    try:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another --out.") from error


if __name__ == "__main__":
    exit_on_user_error(main)
