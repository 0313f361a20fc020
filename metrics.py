"""Scores of the pictures that checkpoints, or the base model, draw for a prompt set; or of pictures that are there already.

python metrics.py --preset tiny --prompt-set tiny_heldout --num-prompts 256 --metrics scene scene_clip
torchrun --nproc_per_node=8 metrics.py --checkpoint URL_OR_FOLDER --prompt-set hpdv2 --num-prompts 3200 --num-repeats 4 \\
    --metrics hpsv2 clip_h14 clip_l14 dreamsim_diversity --out result.json
python metrics.py --images FOLDER --prompt-set my_prompts.txt --metrics pickscore
"""

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fdfo.command_line import parse_metrics_config
from fdfo.config import MetricsConfig, UserError
from fdfo.config_file import config_to_dict
from fdfo.distributed import Job, run_command_line, start_job
from fdfo.meters import StageClock, peak_memory_gib, versions
from fdfo.prompts import choose_prompts, load_prompts
from fdfo.results import Result, changes, plot, result_json, table, warnings, write_json
from rewards import SET_SCORERS, build_scorers, check_prompts, check_scorer_name, describe

if TYPE_CHECKING:
    from fdfo.evaluation import PictureSet

# Diffusers and PEFT take seconds to import: they come in the functions below, so that --help and mistakes answer at once.


def main() -> None:
    argv = sys.argv[1:]
    with start_job() as job:
        config = parse_metrics_config(argv, quiet=not job.is_main)
        check_metrics(config)
        prompts, picture_sets = folder_work(job, config) if config.images is not None else drawing_work(job, config)
        if len(prompts) < job.world_size:
            raise UserError(f"{len(prompts)} prompts cannot feed {job.world_size} processes: start fewer.")
        evaluate(job, config, prompts, picture_sets)


def check_metrics(config: MetricsConfig) -> None:
    """Raises UserError for metrics and files that cannot be, before any model is loaded."""
    for metric in config.metrics:
        check_scorer_name(metric)
        if metric in SET_SCORERS and config.images is None and config.num_repeats < 2:
            raise UserError(f"{metric} compares the pictures of one prompt: add --num-repeats 2 or more.")
    if len(set(config.metrics)) < len(config.metrics):
        raise UserError("--metrics names a scorer twice: leave one out.")
    if config.out is not None and (not os.access(config.out.absolute().parent, os.W_OK) or config.out.is_dir()):
        raise UserError(f"{config.out} cannot be written: give --out a file in a folder that is there.")


def folder_work(job: Job, config: MetricsConfig) -> tuple[list[str], "Iterator[PictureSet]"]:
    """The prompts of a folder of pictures, and the pictures, which are read when they are asked for."""
    from fdfo.evaluation import folder_set
    from fdfo.picture_folder import find_pictures

    entries = job.on_main(lambda: find_pictures(config.images, config.prompt_set))
    job.print(f"{sum(len(entry.files) for entry in entries)} pictures of {len(entries)} prompts in {config.images}")
    return [entry.text for entry in entries], folder_set(job, config.images, entries)


def drawing_work(job: Job, config: MetricsConfig) -> tuple[list[str], "Iterator[PictureSet]"]:
    """The chosen prompts, and every checkpoint's pictures of them, which are drawn when they are asked for."""
    from fdfo.evaluation import drawn_sets, find_subjects
    from fdfo.hub import fetch_prompt_set
    from fdfo.picture_folder import check_new_folder

    def find() -> tuple:
        prompts = load_prompts(fetch_prompt_set(config.prompt_set))
        chosen = choose_prompts(prompts, config.num_prompts, config.prompt_seed)
        subjects = find_subjects(config)
        if config.save_images is not None:
            check_new_folder(config.save_images)
        return chosen, subjects

    chosen, subjects = job.on_main(find)
    total = len(chosen) * config.num_repeats
    for subject in subjects:
        job.print(f"{subject.label}: {total} pictures by {subject.plan.model}, {subject.plan.pictures}")
        if subject.warning:
            job.print(subject.warning)
    return [prompt.text for prompt in chosen], drawn_sets(job, config, subjects, chosen)


def evaluate(job: Job, config: MetricsConfig, prompts: list[str], picture_sets: "Iterator[PictureSet]") -> None:
    """Scores one set of pictures after the other, and reports after each, so that a later failure loses nothing."""
    from fdfo.evaluation import score_pictures

    scorers = build_scorers(config.metrics, job, config.vlm_model, config.vlm_use_fsdp)
    check_prompts(scorers, prompts)
    clock, results, broken = StageClock(job.device), [], []
    for pictures in clock.each("pictures", picture_sets):
        scores = {}
        for name, scorer in scorers.items():
            with clock.stage(name):
                scores[name] = score_pictures(job, name, scorer, pictures)
        seconds = slowest(job.gather_objects(clock.read()))
        results.append(Result(pictures.label, pictures.run, pictures.epoch, pictures.settings, prompts, scores, seconds))
        broken += pictures.broken
        say(job, results[-1], pictures.broken)
        save(job, config, results, describe(scorers), broken)
    if len(results) > 1:
        job.print(table(results))
        job.print(changes(results))
    if config.out is not None and len([result for result in results if result.epoch is not None]) > 1:
        job.on_main(lambda: plot(config.out.with_suffix(".png"), results))
        job.print(f"plot: {config.out.with_suffix('.png')}")


def save(job: Job, config: MetricsConfig, results: list[Result], scorers: dict[str, str], broken: list[str]) -> None:
    """Everything so far into --out, with all that is needed to make the numbers again."""
    if config.out is None:
        return
    content = {
        "results": [result_json(result, config.per_prompt) for result in results],
        "config": config_to_dict(config),
        "versions": versions(),
        "scorers": scorers,
        "broken_pictures": broken,
        "processes": job.world_size,
        "peak_memory_gib": peak_memory_gib(job.device),
    }
    job.on_main(lambda: write_json(config.out, content))


def slowest(ranks: list[dict[str, float]]) -> dict[str, float]:
    """Seconds of every stage on the rank that took longest."""
    return {name: max(seconds[name] for seconds in ranks) for name in ranks[0]}


def say(job: Job, result: Result, broken: list[str]) -> None:
    """One result on the console: table, seconds, and what to be wary of."""
    job.print(f"{result.label}:\n{table([result])}")
    job.print("seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items()))
    for line in warnings(result):
        job.print(f"warning: {line}")
    for name in broken:
        job.print(f"warning: {name} is broken and left out")
    if broken:
        job.print(f"warning: {len(broken)} broken pictures in all")


if __name__ == "__main__":
    run_command_line(main)
