"""What metrics.py found: means and standard errors, as a table, as JSON and as a plot over epochs."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fdfo.config import UserError
from fdfo.logger import as_json
from fdfo.manifest import write_whole


@dataclass(frozen=True)
class Result:
    """Scores of one checkpoint's pictures, or of a folder's."""

    label: str
    run: str  # what a line of the plot joins
    epoch: int | None
    pictures: dict  # how they were drawn; empty for pictures from a folder
    prompts: list[str]  # [P]
    scores: dict[str, list[list[float]]]  # by metric, then prompt: one number a picture, or one in all for a set scorer
    seconds: dict[str, float]  # by stage, of the slowest process


@dataclass(frozen=True)
class Summary:
    """Mean over prompts of each prompt's mean score, and its standard error: pictures of one prompt are not independent."""

    mean: float
    standard_error: float  # NaN for a single prompt
    prompts: int
    left_out: int  # prompts without a finite score


def prompt_means(scores: list[list[float]]) -> list[float]:
    """Mean score of every prompt; NaN for one that has none or one that is not finite."""
    return [sum(values) / len(values) if values else math.nan for values in scores]


def summarise(scores: list[list[float]]) -> Summary:
    finite = [mean for mean in prompt_means(scores) if math.isfinite(mean)]
    average = sum(finite) / len(finite) if finite else math.nan
    return Summary(average, standard_error(finite), len(finite), len(scores) - len(finite))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def table(results: list[Result]) -> str:
    """Mean +- standard error: a line a metric for one result, a line a checkpoint for several."""
    cells = [{metric: summarise(scores) for metric, scores in result.scores.items()} for result in results]
    if len(results) == 1:
        return "\n".join(
            f"{metric:20s} {s.mean:10.4f} +- {s.standard_error:.4f}  ({s.prompts} prompts)" for metric, s in cells[0].items()
        )
    width = max(len(result.label) for result in results)
    lines = [" " * width + "".join(f"{metric:>24s}" for metric in cells[0])]
    for result, row in zip(results, cells, strict=True):
        lines.append(
            f"{result.label:{width}s}" + "".join(f"{f'{s.mean:.4f} +- {s.standard_error:.4f}':>24s}" for s in row.values())
        )
    return "\n".join(lines)


def changes(results: list[Result]) -> str:
    """Every later result against the first, paired by prompt: the same prompts and seeds make this far sharper than the table."""
    first, width = results[0], max(len(result.label) for result in results)
    lines = [f"change from {first.label}, paired by prompt:"]
    for result in results[1:]:
        cells = []
        for metric, scores in result.scores.items():
            pairs = zip(prompt_means(first.scores[metric]), prompt_means(scores), strict=True)
            differences = [after - before for before, after in pairs if math.isfinite(before + after)]
            mean = sum(differences) / len(differences) if differences else math.nan
            cells.append(f"{f'{mean:+.4f} +- {standard_error(differences):.4f}':>24s}")
        lines.append(f"{result.label:{width}s}" + "".join(cells))
    return "\n".join(lines)


def warnings(result: Result) -> list[str]:
    """What a reader of the table should know: scores left out, and scores that cannot tell pictures apart."""
    lines = []
    for metric, scores in result.scores.items():
        summary = summarise(scores)
        if summary.left_out:
            lines.append(
                f"{metric}: {summary.left_out} of {len(scores)} prompts of {result.label} have no finite score and are left out"
            )
        if len({value for values in scores for value in values}) == 1 and sum(map(len, scores)) > 1:
            lines.append(f"{metric}: all pictures of {result.label} got the same score, so it says nothing about them")
    return lines


def result_json(result: Result, per_prompt: bool) -> dict:
    """One entry of the JSON file's `results`."""
    entry = {
        "label": result.label,
        "epoch": result.epoch,
        "pictures": result.pictures,
        "metrics": {metric: vars(summarise(scores)) for metric, scores in result.scores.items()},
        "seconds": result.seconds,
    }
    if per_prompt:
        entry["per_prompt"] = [
            {"prompt": prompt} | {metric: scores[i] for metric, scores in result.scores.items()}
            for i, prompt in enumerate(result.prompts)
        ]
    return entry


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file whole or not at all. Raises UserError."""
    try:
        write_whole(path, json.dumps(as_json(content), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another --out.") from error


def plot(path: Path, results: list[Result]) -> None:
    """Every metric over epochs: a panel a metric, a line a run with one standard error, the base model as a level. Raises UserError."""
    from matplotlib.figure import Figure  # half a second to import, needed for several checkpoints alone
    from matplotlib.ticker import MaxNLocator

    metrics, dated = list(results[0].scores), [result for result in results if result.epoch is not None]
    rows, columns = -(-len(metrics) // 3), min(3, len(metrics))
    figure = Figure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for metric, panel in zip(metrics, axes, strict=False):
        for run in dict.fromkeys(result.run for result in dated):
            epochs = [result.epoch for result in dated if result.run == run]
            points = [summarise(result.scores[metric]) for result in dated if result.run == run]
            if run == "base":
                panel.axhline(points[0].mean, color="grey", linestyle="--", label=run)
                continue
            panel.errorbar(epochs, [p.mean for p in points], [p.standard_error for p in points], marker="o", capsize=2, label=run)
        panel.set(title=metric, xlabel="epoch")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid(alpha=0.3)
    for panel in axes[len(metrics) :]:
        panel.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another --out.") from error
