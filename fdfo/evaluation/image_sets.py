"""The images that metrics.py scores: drawn by checkpoints, or read from a folder; and their scores, prompt by prompt."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from fdfo.config.errors import UserError
from fdfo.config.plan import ImagePlan, plan_images
from fdfo.config.tool_options import MetricsConfig
from fdfo.distributed.job import Job
from fdfo.distributed.machine import progress_bar
from fdfo.evaluation.image_folder import PromptImages, read_images, save_image
from fdfo.model.flow_model import FlowModel
from fdfo.model.images import ImageText, check_sides, draw_images, encode_for_images, load_for_images
from fdfo.run_folder.find_checkpoint import (
    Checkpoint,
    find_checkpoint,
    guidance_warning,
    run_checkpoints,
    saved_config,
    trained_guidance,
)
from fdfo.storage.prompts import ChosenPrompt
from rewards.presets import SET_SCORERS
from rewards.scorer import Scorer, SetScorer, checked_scores

SCORING_SLICE = 64  # images between two updates of the progress bar


@dataclass(frozen=True)
class ImageSet:
    """This rank's images, a prompt's together."""

    prompts: list[str]  # [P]
    counts: list[int]  # [P], images of each prompt
    images: torch.Tensor  # [N, 3, H, W] uint8


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a checkpoint, the base model, or a folder of images."""

    label: str
    run: str  # a line of a plot over epochs joins the subjects of one run
    epoch: int | None = None
    adapter: Path | None = None
    plan: ImagePlan | None = None  # None for a folder
    warning: str | None = None  # if the plan does not suit the adapter
    broken: list[str] = field(default_factory=list)  # files of a folder, on all ranks, that are no images

    @property
    def settings(self) -> dict:
        """How the images are drawn; empty for a folder."""
        return {} if self.plan is None else asdict(self.plan.settings)


def find_subjects(config: MetricsConfig) -> list[Subject]:
    """Find every checkpoint that --checkpoint names; a run folder means all of its own. Raises UserError."""
    found: list[Checkpoint | None] = []
    for name in config.checkpoint or ("base",):
        if name == "base":
            found.append(None)
        elif (Path(name) / "checkpoints").is_dir():
            found += [find_checkpoint(str(folder)) for folder in run_checkpoints(Path(name))]
        else:
            found.append(find_checkpoint(name))
    given = sorted((checkpoint for checkpoint in found if checkpoint is not None), key=lambda checkpoint: checkpoint.run is None)
    reference = given[0] if given else None  # the base is drawn as the first run's checkpoints are
    subjects = [subject_of(config, checkpoint, reference) for checkpoint in found]
    first = subjects[0]
    for other in subjects:
        if (other.plan.model, other.plan.half_precision) != (first.plan.model, first.plan.half_precision):
            raise UserError(f"{other.label} and {first.label} have different base models: evaluate them in separate calls.")
    return subjects


def subject_of(config: MetricsConfig, checkpoint: Checkpoint | None, reference: Checkpoint | None) -> Subject:
    """Return the subject of a checkpoint, or without one, of the base model drawn as the reference is."""
    drawn_as = checkpoint or reference
    plan = plan_images(config, saved_config(drawn_as), trained_guidance(drawn_as))
    if checkpoint is None:
        return Subject("base", "base", 0, plan=plan)
    number = re.fullmatch(r"epoch-(\d+)", checkpoint.folder.name)
    epoch, warning = int(number[1]) if number else None, guidance_warning(checkpoint, plan.settings.guidance)
    return Subject(checkpoint.label, checkpoint.run_name, epoch, checkpoint.adapter, plan, warning)


def drawn_sets(
    job: Job, config: MetricsConfig, subjects: list[Subject], chosen: list[ChosenPrompt]
) -> Iterator[tuple[Subject, ImageSet]]:
    """Draw the subjects' images, one subject after the other; whole prompts are shared among the ranks.

    The base model is loaded and the prompts are encoded once; then the text encoders' memory is freed.
    """
    own = job.share(len(chosen))
    prompts = [chosen[i].text for i in own]
    model = load_for_images(subjects[0].plan, None, job.device)
    text = encode_for_images(model, prompts)
    model.drop_text_encoders()
    for subject in subjects:
        check_sides(model, subject.plan.settings)
        model.remove_adapter()
        if subject.adapter is not None:
            model.load_adapter(subject.adapter)
            model.to_device()
        images = draw_share(job, config, subject, Share(model, text, chosen, len(subjects) > 1))
        yield subject, ImageSet(prompts, [config.num_repeats] * len(own), images)


@dataclass(frozen=True)
class Share:
    """What the drawing of all subjects has in common on this rank."""

    model: FlowModel
    text: ImageText  # this rank's prompts
    chosen: list[ChosenPrompt]  # of the whole job
    several: bool  # there are several subjects, each with a folder of its own in --save-images


def seed_of(config: MetricsConfig, world: int | None, prompt: int, repeat: int) -> int:
    """Return the seed of an image, from its prompt's index among the chosen ones and its repeat (docs/method.md 5).

    world: None, or the number W of processes of the published way. It deals the prompts out to them in turn, and each counts its
    own: W prompts share a seed.
    """
    place = prompt if world is None else prompt // world
    return config.image_seed + place * config.num_repeats + repeat


def draw_share(job: Job, config: MetricsConfig, subject: Subject, share: Share) -> torch.Tensor:
    """Draw this rank's images: [N, 3, H, W] uint8; save them as they come with --save-images."""
    own, repeats, folder = job.share(len(share.chosen)), config.num_repeats, config.save_images
    if folder is not None and share.several:
        folder = folder / subject.label
    places = [(i, repeat) for i in own for repeat in range(repeats)]
    rows = [i - own.start for i, _ in places]
    seeds = [seed_of(config, subject.plan.settings.published_processes, i, repeat) for i, repeat in places]
    images: list[torch.Tensor] = []
    with progress_bar(job, len(places), "drawing") as bar:
        for batch in draw_images(share.model, share.text, rows, seeds, subject.plan.settings):
            if folder is not None:
                for image, (i, repeat) in zip(batch, places[len(images) :], strict=False):
                    save_image(folder, share.chosen[i].number, repeat, image)
            images += batch
            bar.update(len(batch))
    return torch.stack(images)


def folder_set(job: Job, folder: Path, entries: list[PromptImages]) -> Iterator[tuple[Subject, ImageSet]]:
    """Read the images of a folder as one set. Raises UserError if a rank is left without an image."""
    mine = [entries[i] for i in job.share(len(entries))]
    images, counts, broken = read_images(mine)
    if min(job.gather_objects(len(images))) == 0:
        raise UserError(f"{folder} has too few intact images for {job.world_size} processes: start fewer, or restore the files.")
    all_broken = [name for names in job.gather_objects(broken) for name in names]
    yield Subject(str(folder), str(folder), broken=all_broken), ImageSet([entry.text for entry in mine], counts, images)


def score_images(job: Job, name: str, scorer: Scorer | SetScorer, images: ImageSet) -> list[list[float]]:
    """Score every prompt of the job by one metric, on every rank: a number per image, or one in all from a set scorer."""
    pixels, counts = images.images, images.counts
    if name in SET_SCORERS:
        own = [[value] for value in scorer.score_sets(pixels, counts).tolist()]
    else:
        repeated = [prompt for prompt, count in zip(images.prompts, counts, strict=True) for _ in range(count)]
        parts, slices = [], [slice(start, start + SCORING_SLICE) for start in range(0, len(pixels), SCORING_SLICE)]
        with progress_bar(job, len(pixels), name) as bar:
            for part, fresh in job.rounds(slices):
                values = checked_scores(name, scorer, repeated[part], pixels[part])
                parts += [values] if fresh else []
                bar.update(len(values) if fresh else 0)
        own = [values.tolist() for values in torch.cat(parts).split(counts)]
    return [scores for rank in job.gather_objects(own) for scores in rank]
