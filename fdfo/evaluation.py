"""What metrics.py evaluates: the pictures that checkpoints draw, or those of a folder, prompt by prompt, and their scores."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fdfo.checkpoint import Checkpoint, drawing_settings, find_checkpoint, guidance_warning, run_checkpoints
from fdfo.config import MetricsConfig, UserError
from fdfo.distributed import Job
from fdfo.manifest import is_folder
from fdfo.meters import progress_bar
from fdfo.model import FlowModel
from fdfo.picture_folder import PromptPictures, read_pictures, save_picture
from fdfo.pictures import PictureText, check_settings, draw_pictures, encode_for_pictures, load_for_pictures
from fdfo.plan import PicturePlan, PictureSettings, plan_pictures
from fdfo.prompts import ChosenPrompt
from rewards import SET_SCORERS, Scorer, SetScorer, checked_scores

SCORING_SLICE = 64  # pictures between two movements of the progress bar


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a checkpoint, or the base model."""

    label: str
    run: str
    epoch: int | None
    adapter: Path | None
    plan: PicturePlan
    warning: str | None  # where the plan does not suit the adapter


def find_subjects(config: MetricsConfig) -> list[Subject]:
    """Every checkpoint that --checkpoint names, a run folder as all of its own. Downloads those on the hub. Raises UserError."""
    found: list[Checkpoint | None] = []
    for name in config.checkpoint or ("base",):
        if name == "base":
            found.append(None)
        elif is_folder(Path(name) / "checkpoints"):
            found += [find_checkpoint(str(folder)) for folder in run_checkpoints(Path(name))]
        else:
            found.append(find_checkpoint(name))
    given = sorted((checkpoint for checkpoint in found if checkpoint is not None), key=lambda checkpoint: checkpoint.run is None)
    reference = given[0] if given else None  # the base is drawn as the first run's checkpoints are
    subjects = [subject(config, checkpoint, reference) for checkpoint in found]
    for other in subjects:
        if (other.plan.model, other.plan.half_precision) != (subjects[0].plan.model, subjects[0].plan.half_precision):
            raise UserError(f"{other.label} and {subjects[0].label} have different base models: evaluate them in separate calls.")
    return subjects


def subject(config: MetricsConfig, checkpoint: Checkpoint | None, reference: Checkpoint | None) -> Subject:
    """The subject of a checkpoint; of the base model, drawn as the reference is, where there is none."""
    plan = plan_pictures(config, *drawing_settings(checkpoint or reference))
    if checkpoint is None:
        return Subject("base", "base", 0, None, plan, None)
    number = re.fullmatch(r"epoch-(\d+)", checkpoint.folder.name)
    warning = guidance_warning(checkpoint, plan.pictures.guidance)
    return Subject(checkpoint.label, checkpoint.run_name, int(number[1]) if number else None, checkpoint.folder, plan, warning)


@dataclass(frozen=True)
class PictureSet:
    """This rank's share of the pictures of one checkpoint, or of a folder."""

    label: str
    run: str  # what a line of a plot over epochs joins
    epoch: int | None
    settings: dict  # how they were drawn; empty for pictures from a folder
    prompts: list[str]  # [P], this rank's
    counts: list[int]  # [P], pictures of each prompt
    images: torch.Tensor  # [N, 3, H, W] uint8, a prompt's pictures together
    broken: list[str]  # files of all ranks that are no pictures


def drawn_sets(job: Job, config: MetricsConfig, subjects: list[Subject], chosen: list[ChosenPrompt]) -> Iterator[PictureSet]:
    """Draws the subjects' pictures, one subject after the other; whole prompts are shared among the ranks.

    The base model is loaded and the prompts are encoded once; then the text encoders' memory is free.
    """
    own = job.share(len(chosen))
    prompts = [chosen[i].text for i in own]
    model = load_for_pictures(subjects[0].plan, None, job.device)
    text = encode_for_pictures(model, prompts)
    model.drop_text_encoders()
    for subject in subjects:
        check_settings(model, subject.plan.pictures)
        model.remove_adapter()
        if subject.adapter is not None:
            model.load_adapter(subject.adapter)
            model.to_device()
        folder = config.save_images
        if folder is not None and len(subjects) > 1:
            folder = folder / subject.label
        images = draw_share(job, config, model, text, subject.plan.pictures, chosen, folder)
        counts = [config.num_repeats] * len(own)
        yield PictureSet(subject.label, subject.run, subject.epoch, asdict(subject.plan.pictures), prompts, counts, images, [])


def draw_share(
    job: Job,
    config: MetricsConfig,
    model: FlowModel,
    text: PictureText,
    settings: PictureSettings,
    chosen: list[ChosenPrompt],
    folder: Path | None,
) -> torch.Tensor:
    """This rank's pictures: [N, 3, H, W] uint8, saved as they come where there is a folder for them.

    The seed of a picture is image_seed + (global prompt index) num_repeats + repeat (METHOD.md 5).
    """
    own, repeats = job.share(len(chosen)), config.num_repeats
    positions = [(i, repeat) for i in own for repeat in range(repeats)]
    rows = [i - own.start for i, _ in positions]
    seeds = [config.image_seed + i * repeats + repeat for i, repeat in positions]
    pictures: list[torch.Tensor] = []
    with progress_bar(job, len(positions), "drawing") as bar:
        for batch in draw_pictures(model, text, rows, seeds, settings):
            if folder is not None:
                for picture, (i, repeat) in zip(batch, positions[len(pictures) :], strict=False):
                    save_picture(folder, chosen[i].number, repeat, picture)
            pictures += batch
            bar.update(len(batch))
    return torch.stack(pictures)


def folder_set(job: Job, folder: Path, entries: list[PromptPictures]) -> Iterator[PictureSet]:
    """The pictures of a folder as one set. Raises UserError where a rank is left without a picture."""
    own = job.share(len(entries))
    mine = [entries[i] for i in own]
    images, counts, broken = read_pictures(mine)
    if min(job.gather_objects(len(images))) == 0:
        raise UserError(f"{folder} has too few whole pictures for {job.world_size} processes: start fewer, or restore the files.")
    all_broken = [name for names in job.gather_objects(broken) for name in names]
    yield PictureSet(str(folder), str(folder), None, {}, [entry.text for entry in mine], counts, images, all_broken)


def score_pictures(job: Job, name: str, scorer: Scorer | SetScorer, pictures: PictureSet) -> list[list[float]]:
    """Scores of one metric for every prompt of the job, on every rank: a number a picture, or one in all from a set scorer."""
    images, counts = pictures.images, pictures.counts
    if name in SET_SCORERS:
        own = [[value] for value in scorer.score_sets(images, counts).tolist()]
    else:
        repeated = [prompt for prompt, count in zip(pictures.prompts, counts, strict=True) for _ in range(count)]
        parts = []
        with progress_bar(job, len(images), name) as bar:
            for part, fresh in job.rounds(len(images), SCORING_SLICE):
                values = checked_scores(name, scorer, repeated[part], images[part])
                parts += [values] if fresh else []
                bar.update(len(values) if fresh else 0)
        own = [values.tolist() for values in torch.cat(parts).split(counts)]
    return [scores for rank in job.gather_objects(own) for scores in rank]
