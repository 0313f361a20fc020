"""Records an evaluation in the run folder: its line of the log, its sample sheet, the link to the best checkpoint, the report."""

import math
import time
from dataclasses import asdict
from pathlib import Path

import torch

from fdfo.config.errors import or_warn
from fdfo.evaluation.best_checkpoint import best_epoch, diversity_warnings, hacking_warnings
from fdfo.evaluation.heldout import HeldOut
from fdfo.evaluation.statistics import REWARD, Evaluation, evaluation_of, paired_change, score_warning, summarise
from fdfo.report.html import write_report
from fdfo.report.sheets import grid_sheet, save_sheet
from fdfo.run_folder.find_checkpoint import all_checkpoints, epochs_and_steps
from fdfo.run_folder.log import RunLog
from fdfo.run_folder.save_checkpoint import point_to_best
from fdfo.storage.prompts import prompts_hash
from rewards.presets import SET_SCORERS

SHOWN_IMAGES = 12  # of a sheet
REPORT_SECONDS = 20  # between two reports; a run that ends writes its own in any case


def record(log: RunLog, held_out: HeldOut, evaluation: Evaluation, images: torch.Tensor, seconds: float) -> None:
    """Record an evaluation. images [P, 3, H, W] uint8: one per prompt, of at least the first prompts. Raises UserError."""
    shown = min(SHOWN_IMAGES, len(images))
    sheet = grid_sheet(held_out.prompts[:shown], images[:shown], columns=4, cols=1, rows=1)
    or_warn(lambda: save_sheet(sheet, log.run / "samples" / f"epoch-{evaluation.epoch:07d}.jpg"))
    evaluations = [*map(evaluation_of, log.evaluations), evaluation]
    first = evaluations[0]
    summaries = {name: summarise(values) for name, values in evaluation.scores.items()}
    best = best_epoch(evaluations, held_out.metrics, saved_epochs(log.run))
    log.write(
        "eval", evaluation.epoch, prompts=len(held_out.prompts), prompt_sum=prompts_hash(held_out.prompts), repeats=held_out.repeats,
        held_out=list(held_out.metrics), scores=evaluation.scores,
        means={name: summary.mean for name, summary in summaries.items()},
        standard_errors={name: summary.standard_error for name, summary in summaries.items()},
        since=first.epoch,
        changes=changes_between(first, evaluation),
        best=best, warnings=warnings(held_out, evaluations), seconds=seconds,
    )  # fmt: skip
    point_to_best(log.run, best)
    refresh_report(log.run)


def refresh_report(run: Path) -> None:
    """Write the report, unless it is younger than REPORT_SECONDS: drawing it takes a second."""
    report = run / "report.html"
    if not report.exists() or time.time() - report.stat().st_mtime > REPORT_SECONDS:
        or_warn(lambda: write_report(run))


def warnings(held_out: HeldOut, evaluations: list[Evaluation]) -> list[str]:
    """Return the warnings of the newest evaluation."""
    diversities = [name for name in held_out.metrics if name in SET_SCORERS]
    found = hacking_warnings(evaluations, [name for name in held_out.metrics if name not in SET_SCORERS])
    found += diversity_warnings(evaluations, diversities, held_out.least_diversity)
    found += filter(None, (score_warning(name, values) for name, values in evaluations[-1].scores.items()))
    if broken := sum(not math.isfinite(value) for value in evaluations[-1].scores.get(REWARD, ())):
        found.append(f"{broken} of {len(held_out.prompts)} held-out prompts have no reward: an image or a score is not finite")
    return found


def newest_evaluation(log: RunLog) -> dict:
    """Return the log's newest line of kind eval, with the changes since the first one, which early versions did not log."""
    first, newest = evaluation_of(log.evaluations[0]), evaluation_of(log.evaluations[-1])
    return log.evaluations[-1] | {"changes": changes_between(first, newest)}


def changes_between(first: Evaluation, second: Evaluation) -> dict[str, dict]:
    """Return the paired change of every score, as the log has it."""
    return {name: asdict(paired_change(first.scores[name], values)) for name, values in second.scores.items()}


def best_of(log: RunLog, held_out: HeldOut | None) -> int | None:
    """Return the best epoch by the evaluations in the log."""
    metrics = () if held_out is None else held_out.metrics
    return best_epoch([evaluation_of(line) for line in log.evaluations], metrics, saved_epochs(log.run))


def saved_epochs(run: Path) -> set[int]:
    """Return the whole epochs after which a run has a checkpoint."""
    return {epochs for epochs, steps in map(epochs_and_steps, all_checkpoints(run)) if steps == 0}
