"""Base model against trained adapter on held-out prompts, at the end of a training run."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fdfo.config import TrainConfig
from fdfo.distributed import Job
from fdfo.model import FlowModel
from fdfo.pictures import draw_pictures, encode_for_pictures
from fdfo.plan import PictureSettings
from fdfo.prompts import load_prompts
from fdfo.results import standard_error
from fdfo.rollout import gather_scores
from fdfo.sheets import before_after_sheet
from rewards import Scorer

HELDOUT_SEED = 100_000


@dataclass(frozen=True)
class Comparison:
    """Scores of the same prompts and seeds before and after: means, and the standard error of the paired difference."""

    metric: str
    before: float
    after: float
    error: float
    count: int

    def describe(self) -> str:
        return (
            f"held-out {self.metric} score {self.before:.1f} -> {self.after:.1f} "
            f"({self.after - self.before:+.1f} +- {self.error:.1f}, {self.count} captions)"
        )


def compare(metric: str, before: list[float], after: list[float]) -> Comparison:
    error = standard_error([b - a for a, b in zip(before, after, strict=True)])
    return Comparison(metric, sum(before) / len(before), sum(after) / len(after), error, len(before))


def compare_with_base(
    job: Job, model: FlowModel, config: TrainConfig, scorers: dict[str, Scorer], folder: Path
) -> list[Comparison]:
    """Base model against adapter on the held-out prompts, shared among ranks; draws before_after.png into the run folder."""
    prompts = load_prompts(config.heldout_prompt_set)[: config.heldout_prompts]
    own = job.share(len(prompts))
    settings = PictureSettings(
        config.sample.resolution,
        config.sample.resolution,
        config.sample.num_solver_steps,
        config.sample.guidance_scale,
        32 if config.preset == "tiny" else 4,
    )
    mine, seeds = [prompts[i] for i in own], [HELDOUT_SEED + i for i in own]
    model.to_device()
    text = encode_for_pictures(model, mine)
    with model.base():
        before = torch.cat(list(draw_pictures(model, text, range(len(mine)), seeds, settings)))
    after = torch.cat(list(draw_pictures(model, text, range(len(mine)), seeds, settings)))
    both = [
        gather_scores(job, {metric: scorer.score(mine, images) for metric, scorer in scorers.items()})
        for images in (before, after)
    ]
    if job.is_main:
        before_after_sheet(mine[:6], before[:6], after[:6]).save(folder / "before_after.png")
    return [compare(metric, both[0][metric], both[1][metric]) for metric in scorers]
