"""The curves of the report: which there are, and how bokeh draws them."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fdfo.report.run_data import Run, number

if TYPE_CHECKING:  # bokeh takes a second to import, so the functions that draw import it
    from bokeh.models import Range1d, Span
    from bokeh.plotting import figure

COLORS = ("#2f7de1", "#d9661f", "#12926f", "#a17c0d", "#cf4a96", "#8a6cf0", "#74818f", "#e0483e")  # legible on white and on black
DASHES = ((), (7, 3), (2, 3), (9, 3, 2, 3))
STEPS = "Mean and range of the epoch's optimizer steps."


@dataclass(frozen=True)
class Point:
    """A value at an epoch, the ends of its band (not a number where there is none), and how it reads."""

    epoch: int
    value: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Series:
    name: str
    points: list[Point]
    color: str
    dash: tuple[int, ...] = ()


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]
    text: bool = False  # and not numbers
    note: str = ""


@dataclass(frozen=True)
class Chart:
    title: str
    note: str = ""
    badge: str = ""
    log: bool = False
    zero: bool = False  # the axis starts at 0
    dots: bool = False
    stacked: bool = False
    best: int | None = None  # an epoch to mark
    series: tuple[Series, ...] = ()

    def table(self) -> Table:
        """Return the values of every series by epoch."""
        texts = [{point.epoch: point.text for point in series.points} for series in self.series]
        rows = [[str(epoch), *(text.get(epoch, "–") for text in texts)] for epoch in sorted(set().union(*texts))]
        return Table(["epoch", *(series.name for series in self.series)], rows)


def with_error(value: object, error: object = None) -> str:
    """Return a number with as many digits as its standard error allows, or with four."""
    value, error = number(value), number(error)
    if value is None:
        return "–"
    if error and 1e-9 < error < 1e6:
        digits = max(0, 1 - math.floor(math.log10(error)))
        text = f"{value:.{digits}f} ± {error:.{digits}f}"
    else:
        style = ".4g" if value == 0 or 1e-4 <= abs(value) < 1e4 else ".0f" if 1 < abs(value) < 1e6 else ".2e"
        text = f"{value:{style}}"
    return text.replace("-", "−")


def make_point(epoch: int, mean: object, error: object = None, steps: list[object] | None = None) -> Point:
    """Return a mean with a band: of one standard error, or from the least to the greatest of the optimizer steps."""
    value, spread = (math.nan if number(one) is None else number(one) for one in (mean, error))
    values = [number(step) for step in steps or [] if number(step) is not None]
    low, high = (min(values), max(values)) if values else (value - spread, value + spread)
    text = with_error(value, spread) + (f" ({with_error(low)} to {with_error(high)})" if values else "")
    return Point(epoch, value, low, high, text)


# ---------------------------------------------------------------------------------------------------------------------
# which curves there are


def curve(chart: Chart, runs: list[Run], points: Callable[[Run], list[Point]], color: int = 0) -> list[Chart]:
    """Return the chart with a series a run, or nothing where no run has a value. The colour of a single run is given."""
    series = [Series(run.name, points(run), COLORS[i % 8], DASHES[(i + i // 8) % 4]) for i, run in enumerate(runs)]
    if len(runs) == 1:
        series = [Series(chart.title, series[0].points, COLORS[color])]
    drawn = tuple(one for one in series if not all(math.isnan(point.value) for point in one.points))
    return [replace(chart, series=drawn)] if drawn else []


def epoch_points(value: Callable[[dict], object]) -> Callable[[Run], list[Point]]:
    """Return a function that gives a run's points of a value, each with the range over the epoch's optimizer steps."""
    return lambda run: [
        make_point(line["epoch"], value(line), steps=[value(step) for step in run.steps.get(line["epoch"], [])])
        for line in run.epochs
    ]


def eval_points(name: str) -> Callable[[Run], list[Point]]:
    """Return a function that gives a run's points of a held-out score."""
    return lambda run: [
        make_point(line["epoch"], line.get("means", {}).get(name), line.get("standard_errors", {}).get(name))
        for line in run.evals
    ]


def reward_points(run: Run) -> list[Point]:
    """Return the training reward. A pair counts as one in the standard error, since its two images are alike."""
    pairs, _ = run.settings.get("total_pairs_per_epoch", ("", None))
    points = []
    for line in run.epochs:
        kept = (int(pairs) if pairs.isdecimal() else 0) - (number(line.get("dropped_pairs")) or 0)
        spread = number(line.get("reward_std"))
        error = spread / math.sqrt(kept) if spread is not None and kept > 0 else None
        points.append(make_point(line["epoch"], line.get("reward_mean"), error))
    return points


def shown_metrics(runs: list[Run]) -> list[str]:
    """Return the evaluated names. A scorer that is the whole reward of a single run is not shown twice."""
    twice = runs[0].whole_reward if len(runs) == 1 else None
    return [name for name in dict.fromkeys(name for run in runs for name in run.metrics) if name != twice]


def reward_charts(runs: list[Run]) -> list[Chart]:
    """Return the training reward, the held-out scores, and the scorers of a reward that has several."""
    note = "Mean over the epoch's images. Band: ± 1 standard error, the spread over the root of the number of pairs."
    charts = curve(Chart("Training reward", note, "training prompts"), runs, reward_points)
    best = runs[0].best["epoch"] if len(runs) == 1 and runs[0].best else None
    note = "Mean over the held-out prompts. Band: ± 1 standard error over prompts."
    note += "" if best is None else f" Dashed line: the best epoch, {best}."
    for name in shown_metrics(runs):
        title, unseen = name, any(name in run.unseen for run in runs)
        if name == "reward":
            title = "Held-out reward" + (f" ({runs[0].whole_reward})" if len(runs) == 1 and runs[0].whole_reward else "")
        chart = Chart(title, note, "not trained on" if unseen else "held-out prompts", dots=True, best=best)
        charts += curve(chart, runs, eval_points(name), 3 if unseen else 2)
    scorers = dict.fromkeys(name for run in runs for line in run.epochs for name in line.get("scores", {}))
    for name in scorers if len(scorers) > 1 else ():
        chart = Chart(name, "Mean over the epoch's images.", "training prompts")
        charts += curve(chart, runs, epoch_points(lambda line, name=name: line.get("scores", {}).get(name)))
    return charts


def update_charts(runs: list[Run]) -> list[Chart]:
    """Return clipfrac, gradient norm and seconds: of a single run stacked by stage."""
    clipfrac = Chart("Clipfrac", f"Share of samples whose ratio left the clip range. {STEPS}", zero=True)
    norm = Chart("Gradient norm", f"Before clipping, on a log scale. {STEPS}", log=True)
    charts = curve(clipfrac, runs, epoch_points(lambda line: line.get("clipfrac")), 4)
    charts += curve(norm, runs, epoch_points(lambda line: line.get("grad_norm")), 5)
    if len(runs) > 1:
        seconds = Chart("Seconds an epoch", "All stages together.", zero=True)
        return charts + curve(seconds, runs, epoch_points(lambda line: total(line.get("seconds")) or None))
    stages = dict.fromkeys(stage for line in runs[0].epochs for stage in line.get("seconds", {}))
    points = {name: epoch_points(lambda line, name=name: line.get("seconds", {}).get(name))(runs[0]) for name in stages}
    longest = sorted(stages, key=lambda name: -sum(point.value for point in points[name] if point.value > 0))
    series = tuple(Series(name, points[name], COLORS[i % 8]) for i, name in enumerate(longest))
    note = "Stacked by stage. The clock is read at an epoch's end, so a checkpoint counts to the next epoch."
    return charts + ([Chart("Seconds an epoch", note, zero=True, stacked=True, series=series)] if series else [])


def total(seconds: object) -> float:
    """Return the sum of an epoch's seconds by stage."""
    return sum(number(value) or 0.0 for value in seconds.values()) if isinstance(seconds, dict) else 0.0


def other_charts(runs: list[Run]) -> list[Chart]:
    """Return a curve of every other number of the epochs' lines."""
    names = dict.fromkeys(name for run in runs for line in run.epochs for name in line if number(line[name]) is not None)
    found, note = [], "Band, where there is one: range of the optimizer steps."
    for name in (name for name in names if name not in ("epoch", "reward_mean", "clipfrac", "grad_norm")):
        chart = Chart(name.replace("_", " "), note)
        found += curve(chart, runs, epoch_points(lambda line, name=name: line.get(name)), 6)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# drawing


def draw(charts: list[Chart]) -> str:
    """Return as JSON what bokeh's script draws: chart i goes into the element chart-i. All share the epochs and the crosshair."""
    from bokeh.document import Document
    from bokeh.models import Range1d, Span

    last = max([1, *(point.epoch for chart in charts for series in chart.series for point in series.points)])
    margin = max(0.5, last / 60)
    x_range, guide = Range1d(-margin, last + margin), Span(dimension="height", line_dash="dotted")
    document = Document()
    with document.models.freeze():  # without it bokeh looks through all figures again for each one
        for chart in charts:
            document.add_root(draw_chart(chart, x_range, guide))
    ids = [root.id for root in document.roots]
    items = [{"docid": "report", "root_ids": ids, "roots": {one: f"chart-{i}" for i, one in enumerate(ids)}}]
    return json.dumps({"documents": {"report": document.to_json(deferred=False)}, "items": items})


def draw_chart(chart: Chart, x_range: "Range1d", guide: "Span") -> "figure":
    """Return the figure of a chart. The page's style gives the colours of its text and lines."""
    from bokeh.models import CrosshairTool, DataRange1d, Span
    from bokeh.plotting import figure

    log = chart.log and any(point.value > 0 for series in chart.series for point in series.points)
    plot = figure(
        height=200, sizing_mode="stretch_width", x_range=x_range, y_range=DataRange1d(start=0 if chart.zero else math.nan),
        y_axis_type="log" if log else "linear", toolbar_location=None, tools="", background_fill_color=None,
        border_fill_color=None, outline_line_color=None, min_border_left=48, min_border_right=12,
    )  # fmt: skip
    plot.xaxis.axis_label, plot.xgrid.visible, plot.yaxis.axis_line_color = "epoch", False, None
    plot.xaxis.ticker.min_interval, plot.yaxis.ticker.desired_num_ticks = 1, 5
    for axis in plot.axis:
        axis.update(minor_tick_line_color=None, major_tick_line_color=None, axis_label_standoff=0)
        axis.update(axis_label_text_font_style="normal", axis_label_text_font_size="12px", major_label_text_font_size="12px")
    if chart.stacked:
        columns = {f"stage{i}": [max(0.0, point.value) for point in series.points] for i, series in enumerate(chart.series)}
        source = {"epoch": [point.epoch for point in chart.series[0].points]} | columns
        colors = [series.color for series in chart.series]
        plot.vbar_stack(list(columns), x="epoch", width=1, source=source, color=colors, fill_alpha=0.85, line_color=None)
    else:
        draw_lines(plot, chart, 0 if log else -math.inf)
    if chart.best is not None:
        plot.add_layout(Span(location=chart.best, dimension="height", line_dash="dashed"))
    plot.add_tools(CrosshairTool(dimensions="height", overlay=guide))
    add_tooltips(plot, chart)
    return plot


def draw_lines(plot: "figure", chart: Chart, above: float) -> None:
    """Draw every series with its band, without values that have no place on the axis."""
    for series in chart.series:
        columns = {"epoch": [point.epoch for point in series.points]}
        for name in ("value", "low", "high"):
            values = [getattr(point, name) for point in series.points]
            columns[name] = [value if value > above else math.nan for value in values]
        epochs, values, low, high = columns.values()
        plot.varea(epochs, low, high, color=series.color, alpha=0.18)
        width = 1.3 if len(epochs) > 150 else 2
        plot.line(epochs, values, color=series.color, line_width=width, line_dash=list(series.dash), line_join="round")
        if len(epochs) == 1 or (chart.dots and len(epochs) <= 60):
            plot.scatter(epochs, values, color=series.color, size=6)


def add_tooltips(plot: "figure", chart: Chart) -> None:
    """Show the values of the epoch that is nearest to the pointer."""
    from bokeh.models import ColumnDataSource, HoverTool

    table = chart.table()
    epochs = [int(epoch) for epoch, *_ in table.rows]
    edges = [(a + b) / 2 for a, b in zip(epochs, epochs[1:], strict=False)]
    columns = {"left": [epochs[0] - 1, *edges], "right": [*edges, epochs[-1] + 1]}
    columns["text"] = ["\n".join(f"{name}: {text}" for name, text in zip(table.head, row, strict=True)) for row in table.rows]
    strips = plot.vstrip("left", "right", fill_alpha=0, hatch_alpha=0, line_alpha=0, source=ColumnDataSource(columns))
    plot.add_tools(HoverTool(renderers=[strips], tooltips="@text", point_policy="follow_mouse", show_arrow=False))
