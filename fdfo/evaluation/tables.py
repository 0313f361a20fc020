"""Shows what metrics.py found: means and standard errors as a table, as JSON and as a plot over epochs."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

from fdfo.config.errors import UserError
from fdfo.evaluation.statistics import paired_change, prompt_means, score_warning, summarise
from fdfo.run_folder.log import as_json
from fdfo.storage.atomic_files import write_bytes, write_text


@dataclass(frozen=True)
class Result:
    """Scores of one checkpoint's images, or of a folder's."""

    label: str
    run: str  # a line of the plot joins the results of one run
    epoch: int | None
    settings: dict  # how the images were drawn; empty for a folder
    prompts: list[str]  # [P]
    scores: dict[str, list[list[float]]]  # by metric, then prompt: one number per image, or one in all for a set scorer
    seconds: dict[str, float]  # by stage, of the slowest process


def table(results: list[Result]) -> str:
    """Return mean +- standard error: a line per metric for one result, a line per checkpoint for several."""
    cells = [{metric: summarise(prompt_means(scores)) for metric, scores in result.scores.items()} for result in results]
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
    """Compare every later result with the first, paired by prompt: far sharper than the table, since prompts and seeds are the same."""
    first, width = results[0], max(len(result.label) for result in results)
    lines = [f"change from {first.label}, paired by prompt:"]
    for result in results[1:]:
        cells = []
        for metric, scores in result.scores.items():
            change = paired_change(prompt_means(first.scores[metric]), prompt_means(scores))
            cells.append(f"{f'{change.difference:+.4f} +- {change.error:.4f}':>24s}")
        lines.append(f"{result.label:{width}s}" + "".join(cells))
    return "\n".join(lines)


def warnings(result: Result) -> list[str]:
    """Warn of scores left out, and of scores that cannot tell images apart."""
    lines = []
    for metric, scores in result.scores.items():
        summary = summarise(prompt_means(scores))
        if summary.left_out:
            lines.append(
                f"{metric}: {summary.left_out} of {len(scores)} prompts of {result.label} have no finite score and are left out"
            )
        if said := score_warning(metric, [value for values in scores for value in values]):
            lines.append(f"{result.label}: {said}")
    return lines


def result_json(result: Result, per_prompt: bool) -> dict:
    """Return one entry of the JSON file's `results`."""
    entry = {
        "label": result.label,
        "epoch": result.epoch,
        "pictures": result.settings,
        "metrics": {metric: vars(summarise(prompt_means(scores))) for metric, scores in result.scores.items()},
        "seconds": result.seconds,
    }
    if per_prompt:
        entry["per_prompt"] = [
            {"prompt": prompt} | {metric: scores[i] for metric, scores in result.scores.items()}
            for i, prompt in enumerate(result.prompts)
        ]
    return entry


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file whole or not at all. Raises UserError."""
    try:
        write_text(path, json.dumps(as_json(content), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another --out.") from error


def plot(path: Path, results: list[Result]) -> None:
    """Plot every metric over epochs: a panel per metric, a line per run with one standard error, the base model as a level."""
    from matplotlib.figure import Figure  # half a second to import, needed only for several checkpoints
    from matplotlib.ticker import MaxNLocator

    metrics, dated = list(results[0].scores), [result for result in results if result.epoch is not None]
    rows, columns = -(-len(metrics) // 3), min(3, len(metrics))
    figure = Figure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for metric, panel in zip(metrics, axes, strict=False):
        for run in dict.fromkeys(result.run for result in dated):
            epochs = [result.epoch for result in dated if result.run == run]
            points = [summarise(prompt_means(result.scores[metric])) for result in dated if result.run == run]
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
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    try:
        write_bytes(path, content.getvalue())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another --out.") from error
