"""report.html: a run's curves, images, settings and versions as one file that needs no network; or several runs in one page."""

import itertools
import secrets
import shlex
import time
from pathlib import Path

from fdfo.config.errors import UserError
from fdfo.report import charts
from fdfo.report.charts import Table, reward_points, shown_metrics, total, with_error
from fdfo.report.run_data import Run, number, read_sheets
from fdfo.storage.atomic_files import write_text

NEWEST = 5  # warnings that are shown without a click
SHEETS = {
    "epoch": ("Samples", "The same prompts and seeds at every evaluation."),
    "pairs": ("Training pairs", "Pairs of the epoch before the evaluation."),
}


def write_report(run: Path, out: Path | None = None, watched: bool = False) -> Path:
    """Write a run's page, whole or not at all, and return its path. A watched page reloads itself. Raises UserError."""
    out, shown = out or run / "report.html", Run(run, run.absolute().name)
    sheets = {kind: found for kind in SHEETS if (found := read_sheets(run, kind))[0]}
    write_page(out, [shown], shown.name, {"sheets": sheets, "watched": watched, "tiles": tiles(shown)})
    return out


def write_comparison(runs: tuple[Path, ...], out: Path) -> Path:
    """Write one page with the curves of several runs, and return its path. Raises UserError."""
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("A run is named twice: name each run folder once.")
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    write_page(out, [Run(run, name) for run, name in zip(runs, names, strict=True)], f"{len(runs)} runs", {})
    return out


def write_page(out: Path, runs: list[Run], title: str, more: dict) -> None:
    """Fill the template. It escapes every text of a run; the curves' JSON has no `<` that could end its element."""
    from bokeh.resources import Resources
    from jinja2 import Environment, FileSystemLoader

    parts = {"reward": charts.reward_charts(runs), "update": charts.update_charts(runs), "other": charts.other_charts(runs)}
    count = itertools.count()
    groups = {name: [(next(count), chart) for chart in part] for name, part in parts.items()}
    template = Environment(autoescape=True, trim_blocks=True, loader=FileSystemLoader(Path(__file__).parent)).get_template
    text = template("page.html").render(
        runs=runs, title=title, groups=groups, kinds=SHEETS, newest=NEWEST, warnings=warnings(runs),
        scores=held_out_table(runs[0]) if len(runs) == 1 else comparison_table(runs), settings=settings_tables(runs),
        starts=[start_of(line) for line in runs[0].starts], nonce=secrets.token_urlsafe(),
        curves=charts.draw([*itertools.chain(*parts.values())]).replace("<", "\\u003c"),
        script="\n".join(Resources("inline", components=["bokeh"]).js_raw),
        written=time.strftime("%Y-%m-%d %H:%M:%S %Z"), **more,
    )  # fmt: skip
    try:
        write_text(out, text.encode("utf-8", "replace").decode())  # a log may hold half of a surrogate pair
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give another --out, or make room.") from error


# ---------------------------------------------------------------------------------------------------------------------
# tiles, lists and tables


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """Return label, value and a remark of the numbers at the top of the page."""
    wanted, _ = run.settings.get("num_epochs", ("", None))
    found = [("Epochs done", str(run.epochs[-1]["epoch"] if run.epochs else 0), f"of {wanted}" if wanted else "")]
    if run.epochs and "reward_mean" in run.epochs[-1]:  # judges of pairs alone give no level
        points = reward_points(run)
        first = f"epoch {points[0].epoch}: {points[0].text}" if len(points) > 1 else ""
        found.append(("Training reward", points[-1].text, first))
    if "reward" in run.metrics:
        remark = f"best: {mean_of(run.best, 'reward')}, epoch {run.best['epoch']}" if run.best else ""
        found.append((f"Held-out reward, epoch {run.evals[-1]['epoch']}", mean_of(run.evals[-1], "reward"), remark))
    if run.epochs:
        seconds = [total(line.get("seconds")) for line in run.epochs]
        spent = sum(seconds) + sum(number(line.get("seconds")) or 0 for line in run.evals)
        found.append(("Seconds an epoch", f"{sum(seconds[-10:]) / len(seconds[-10:]):.1f}", f"{duration(spent)} in all"))
    return found


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def mean_of(line: dict, name: str) -> str:
    return with_error(line.get("means", {}).get(name), line.get("standard_errors", {}).get(name))


def warnings(runs: list[Run]) -> list[tuple[str, str]]:
    """Return the epoch and the text of every warning, the newest first."""
    lines = sorted(((line["epoch"], run.name, line) for run in runs for line in run.epochs + run.evals), key=lambda one: -one[0])
    places = ((f"epoch {epoch}" if len(runs) == 1 else f"{name}, epoch {epoch}", line) for epoch, name, line in lines)
    return [(place, str(text)) for place, line in places for text in line.get("warnings", [])]


def held_out_table(run: Run) -> Table | None:
    """Return every score at the first, the newest and the best evaluation, and the change that the log has."""
    if not run.metrics:
        return None
    first, last, rows = run.evals[0], run.evals[-1], []
    for name in shown_metrics([run]):
        label = f"{name} (not trained on)" if name in run.unseen else name
        rows.append([f"reward ({run.whole_reward})" if name == "reward" and run.whole_reward else label, mean_of(first, name)])
        if last is not first:
            change = last.get("changes", {}).get(name)
            change = change if isinstance(change, dict) else {}
            sign = "+" if (number(change.get("difference")) or 0) > 0 else ""
            rows[-1] += [mean_of(last, name), sign + with_error(change.get("difference"), change.get("error"))]
        rows[-1] += [mean_of(run.best, name)] if run.best else []
    head = ["Held-out prompts", f"epoch {first['epoch']}"]
    head += [f"epoch {last['epoch']}", f"change since epoch {last.get('since', first['epoch'])}"] if last is not first else []
    head += [f"best, epoch {run.best['epoch']}"] if run.best else []
    note = f"{with_error(last.get('prompts'))} prompts, {with_error(last.get('repeats'))} image{'s' * (last.get('repeats') != 1)} each. "
    note += "± is 1 standard error over prompts; that of the change is of the differences prompt by prompt."
    return Table(head, rows, note=note)


def comparison_table(runs: list[Run]) -> Table:
    """Return every run at its newest epoch and evaluation."""
    names = shown_metrics(runs)
    head = ["Run", "epochs", "training reward", "seconds an epoch", "evaluated at"]
    head += ["held-out reward" if name == "reward" else name for name in names] + ["best at"]
    rows = []
    for run in runs:
        epoch, last = run.epochs[-1] if run.epochs else {}, run.evals[-1] if run.evals else {}
        reward = reward_points(run)[-1].text if epoch else "–"
        row = [run.name, str(epoch.get("epoch", 0)), reward, with_error(total(epoch.get("seconds")) or None)]
        row += [with_error(last.get("epoch")), *(mean_of(last, name) for name in names)]
        rows.append([*row, str(run.best["epoch"]) if run.best else "–"])
    note = "Newest epoch and newest evaluation of each run."
    if len({(run.settings.get("reward_preset"), run.settings.get("reward_specs")) for run in runs}) > 1:
        note += " The runs were trained on different rewards: their rewards cannot be compared, the scorers can."
    return Table(head, rows, note=note)


def settings_tables(runs: list[Run]) -> list[Table]:
    """Return the settings of a run that differ from the preset, then all; of several runs those in which they differ."""
    if len(runs) == 1:
        rows = [[name, value, "–" if preset is None else preset] for name, (value, preset) in runs[0].settings.items()]
        changed = [row for row in rows if row[1] != row[2] != "–"]
        named = ("Changed from the preset", changed), ("Setting", rows)
        return [Table([title, "this run", "preset"], part, True) for title, part in named]
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [[name, *(run.settings.get(name, ("–", None))[0] for run in runs)] for name in names]
    return [Table(["Setting", *(run.name for run in runs)], [row for row in rows if len(set(row[1:])) > 1], True)]


def start_of(line: dict) -> tuple[str, str, Table]:
    """Return title, command and versions of a start of the run."""
    title = f"Continued after epoch {line['epoch']}" if line["epoch"] else "Started"
    facts: dict[str, object] = {}
    for name, value in line.items():
        if value is not None and name not in ("kind", "epoch", "command", "changed"):
            facts |= value if isinstance(value, dict) else {name.replace("_", " "): value}
    rows = [[name, str(value)] for name, value in facts.items()]
    return title, shlex.join(map(str, line.get("command", []))), Table(["Versions and scorers", ""], rows, True)
