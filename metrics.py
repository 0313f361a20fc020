"""Score the images that checkpoints, or the base model, draw for a prompt set; or score a folder of images.

python metrics.py --preset tiny --prompt-set tiny_heldout --num-prompts 256 --metrics scene scene_clip
torchrun --nproc_per_node=8 metrics.py --checkpoint URL_OR_FOLDER --prompt-set hpdv2 --num-prompts 3200 --num-repeats 4 \\
    --metrics hpsv2 clip_h14 clip_l14 dreamsim_diversity --out result.json
python metrics.py --images FOLDER --prompt-set my_prompts.txt --metrics pickscore
"""

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fdfo.config.command_line import parse_metrics_config
from fdfo.config.errors import UserError
from fdfo.config.options import to_dict
from fdfo.config.tool_options import MetricsConfig
from fdfo.distributed.job import Job
from fdfo.distributed.launch import run_command_line, start_job
from fdfo.distributed.machine import StageClock, peak_memory_gib, versions
from fdfo.storage.prompts import choose_prompts
from rewards.presets import SET_SCORERS

if TYPE_CHECKING:
    from fdfo.evaluation.image_sets import ImageSet, Subject
    from fdfo.evaluation.tables import Result

    Sets = Iterator[tuple[Subject, ImageSet]]

# Diffusers and PEFT take seconds to import. They are imported in the functions below, so that --help and mistakes answer at once.


def main() -> None:
    argv = sys.argv[1:]
    with start_job() as job:
        config = job.on_main(lambda: read_command_line(argv))
        prompts, image_sets = folder_work(job, config) if config.images is not None else drawing_work(job, config)
        if len(prompts) < job.world_size:
            raise UserError(f"{len(prompts)} prompts cannot feed {job.world_size} processes: start fewer.")
        evaluate(job, config, prompts, image_sets)


def read_command_line(argv: list[str]) -> MetricsConfig:
    """Return the options. Raises UserError for metrics and files that cannot be, before any model is loaded."""
    config = parse_metrics_config(argv)
    from rewards.registry import check_metric_name

    for metric in config.metrics:
        check_metric_name(metric)
        if metric in SET_SCORERS and config.images is None and config.num_repeats < 2:
            raise UserError(f"{metric} compares the images of one prompt: add --num-repeats 2 or more.")
    if len(set(config.metrics)) < len(config.metrics):
        raise UserError("--metrics names a scorer twice: leave one out.")
    if config.out is not None and (not os.access(config.out.absolute().parent, os.W_OK) or config.out.is_dir()):
        raise UserError(f"{config.out} cannot be written: give --out a file in an existing folder.")
    return config


def folder_work(job: Job, config: MetricsConfig) -> "tuple[list[str], Sets]":
    """Return the prompts of a folder of images, and the images, which are read when they are asked for."""
    from fdfo.evaluation.image_folder import find_images
    from fdfo.evaluation.image_sets import folder_set

    entries = job.on_main(lambda: find_images(config.images, config.prompt_set, config.as_published))
    job.print(f"{sum(len(entry.files) for entry in entries)} images of {len(entries)} prompts in {config.images}")
    return [entry.text for entry in entries], folder_set(job, config.images, entries)


def drawing_work(job: Job, config: MetricsConfig) -> "tuple[list[str], Sets]":
    """Return the chosen prompts, and every checkpoint's images of them, which are drawn when they are asked for."""
    from fdfo.evaluation.image_folder import check_new_folder
    from fdfo.evaluation.image_sets import drawn_sets, find_subjects
    from fdfo.storage.hub import load_prompt_set

    def find() -> tuple:
        prompts = load_prompt_set(config.prompt_set, config.as_published)
        chosen = choose_prompts(prompts, config.num_prompts, config.prompt_seed)
        subjects = find_subjects(config)
        if config.save_images is not None:
            check_new_folder(config.save_images)
        return chosen, subjects

    chosen, subjects = job.on_main(find)
    total = len(chosen) * config.num_repeats
    for subject in subjects:
        job.print(f"{subject.label}: {total} images by {subject.plan.model}, {subject.plan.settings.describe()}")
        if subject.warning:
            job.print(subject.warning)
    return [prompt.text for prompt in chosen], drawn_sets(job, config, subjects, chosen)


def evaluate(job: Job, config: MetricsConfig, prompts: list[str], image_sets: "Sets") -> None:
    """Score one set of images after the other, and write the results after each, so that a later failure loses nothing."""
    from fdfo.evaluation.image_sets import score_images
    from fdfo.evaluation.tables import Result, changes, plot, table
    from rewards.registry import VlmSettings, build_scorers
    from rewards.scorer import check_prompts, describe

    vlm = VlmSettings(config.vlm_model, config.vlm_use_fsdp)
    scorers = build_scorers(config.metrics, job, vlm, as_published=config.as_published)
    check_prompts(scorers, prompts)
    clock, results, broken = StageClock(job.device), [], []
    for subject, images in clock.each("pictures", image_sets):
        scores = {}
        for name, scorer in scorers.items():
            with clock.stage(name):
                scores[name] = score_images(job, name, scorer, images)
        seconds = slowest(job.gather_objects(clock.read()))
        results.append(Result(subject.label, subject.run, subject.epoch, subject.settings, prompts, scores, seconds))
        broken += subject.broken
        print_result(job, results[-1], subject.broken)
        save(job, config, results, {"scorers": describe(scorers), "broken_pictures": broken})
    if len(results) > 1:
        job.print(table(results))
        job.print(changes(results))
    if config.out is not None and len([result for result in results if result.epoch is not None and result.run != "base"]) > 1:
        job.on_main(lambda: plot(config.out.with_suffix(".png"), results))
        job.print(f"plot: {config.out.with_suffix('.png')}")


def save(job: Job, config: MetricsConfig, results: "list[Result]", facts: dict) -> None:
    """Write everything so far into --out, with all that is needed to repeat it."""
    from fdfo.evaluation.tables import result_json, write_json

    if config.out is None:
        return
    content = {
        "results": [result_json(result, config.per_prompt) for result in results],
        "config": to_dict(config),
        "versions": versions(),
        **facts,
        "processes": job.world_size,
        "peak_memory_gib": peak_memory_gib(job.device),
    }
    job.on_main(lambda: write_json(config.out, content))


def slowest(ranks: list[dict[str, float]]) -> dict[str, float]:
    """Return the seconds of every stage on the rank that took longest."""
    return {name: max(seconds[name] for seconds in ranks) for name in ranks[0]}


def print_result(job: Job, result: "Result", broken: list[str]) -> None:
    """Print one result: table, seconds and warnings."""
    from fdfo.evaluation.tables import table, warnings

    job.print(f"{result.label}:\n{table([result])}")
    job.print("seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items()))
    for line in warnings(result):
        job.print(f"warning: {line}")
    for name in broken:
        job.print(f"warning: {name} is broken and left out")
    if broken:
        job.print(f"warning: {len(broken)} broken images in all")


if __name__ == "__main__":
    run_command_line(main)
