"""What an evaluation leaves in the run folder: its line of the log, its sample sheet, the link to the best checkpoint, the report."""

import math
from pathlib import Path

import torch

from fdfo.checkpoint import all_checkpoints, position
from fdfo.config import TrainConfig
from fdfo.manifest import text_sum
from fdfo.preparation import Run
from fdfo.report import write_report
from fdfo.results import summarise
from fdfo.selection import REWARD, Evaluation, best_epoch, evaluation_of, hacking_signs
from fdfo.sheets import grid_sheet, save_sheet
from fdfo.training_state import point_to_best
from rewards import SET_SCORERS

SHOWN_PICTURES = 12  # of a sheet


def record(config: TrainConfig, run: Run, evaluation: Evaluation, pictures: torch.Tensor, seconds: float) -> list[str]:
    """Sample sheet, line of the log, checkpoints/best and report of an evaluation; its warnings. pictures [P, 3, H, W], one a prompt."""
    held_out, epoch = run.held_out, evaluation.epoch
    shown = min(SHOWN_PICTURES, len(pictures))
    sheet = grid_sheet(held_out.prompts[:shown], pictures[:shown], columns=4, cols=1, rows=1)
    save_sheet(sheet, run.folder / "samples" / f"epoch-{epoch:07d}.jpg")
    evaluations = [*map(evaluation_of, run.log.evaluations), evaluation]
    diversities = [name for name in held_out.metrics if name in SET_SCORERS]
    warnings = hacking_signs(evaluations, held_out.metrics, diversities, config.eval_least_diversity)
    if broken := sum(not math.isfinite(value) for value in evaluation.scores[REWARD]):
        warnings.append(
            f"{broken} of {len(held_out.prompts)} held-out prompts have no reward: a picture or a score is not finite"
        )
    summaries = {name: summarise([[value] for value in values]) for name, values in evaluation.scores.items()}
    best = best_epoch(evaluations, held_out.metrics, saved_epochs(run.folder))
    run.log.write(
        "eval", epoch, prompts=len(held_out.prompts), prompt_sum=text_sum(held_out.prompts), repeats=held_out.repeats,
        held_out=list(held_out.metrics), scores=evaluation.scores,
        means={name: summary.mean for name, summary in summaries.items()},
        standard_errors={name: summary.standard_error for name, summary in summaries.items()},
        best=best, warnings=warnings, seconds=seconds,
    )  # fmt: skip
    point_to_best(run.folder, best)
    write_report(run.folder)
    return warnings


def best_of(run: Run) -> int | None:
    """The best epoch by the evaluations in the log."""
    metrics = () if run.held_out is None else run.held_out.metrics
    return best_epoch([evaluation_of(line) for line in run.log.evaluations], metrics, saved_epochs(run.folder))


def saved_epochs(run: Path) -> set[int]:
    """The whole epochs after which a run has a checkpoint."""
    return {epochs for epochs, steps in map(position, all_checkpoints(run)) if steps == 0}
