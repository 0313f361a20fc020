"""report.html: a run's curves, sheets, config and versions as one file that needs no network; or several runs in one page.

python -m fdfo.report runs/00000-scene-cfg_1p0                      # writes report.html into the run folder
python -m fdfo.report runs/00000-scene-cfg_1p0 runs/00001-scene-cfg_1p0 --out compare.html
"""

import base64
import json
import math
import re
import shlex
import statistics
import sys
import time
from pathlib import Path

from fdfo.command_line import parse_report_config
from fdfo.config import PRESETS, UserError
from fdfo.config_file import config_to_dict
from fdfo.distributed import run_command_line
from fdfo.manifest import is_file, is_folder, read_json, write_whole

PAGE = Path(__file__).parent / "report_page"  # page.html, into which the other files and the data go
SHEET_BYTES = {"epoch": 16 * 2**20, "pairs": 8 * 2**20}  # of the picture files of each kind that a page holds


def main() -> None:
    config = parse_report_config(sys.argv[1:])
    if len(config.runs) == 1:
        print(f"report: {write_report(config.runs[0], config.out)}")
    else:
        print(f"report: {write_comparison(config.runs, config.out or Path('report.html'))}")


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes a run's page, whole or not at all, into run/report.html or where asked, and returns its path. Raises UserError."""
    out = out or run / "report.html"
    data = run_data(run, run.absolute().name)
    write_page(out, {"runs": [data], "sheets": {kind: sheets(run, kind, limit) for kind, limit in SHEET_BYTES.items()}})
    return out


def write_comparison(runs: tuple[Path, ...], out: Path) -> Path:
    """Writes one page with the curves of several runs, and returns its path. Raises UserError."""
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("A run is named twice: name each run folder once.")
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    write_page(out, {"runs": [run_data(run, name) for run, name in zip(runs, names, strict=True)], "sheets": {}})
    return out


def write_page(out: Path, data: dict) -> None:
    """The page with this data in it. The page's scripts put every text in as text, so only JSON and `<` need care here."""
    text = json.dumps(data | {"written": time.time()}, allow_nan=False).replace("<", "\\u003c")
    parts = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()} | {"data.json": text}
    page = re.sub(r"\{\{([\w.]+)\}\}", lambda match: parts[match[1]], parts["page.html"])
    try:
        write_whole(out, page)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give another --out, or make room.") from error


# ---------------------------------------------------------------------------------------------------------------------
# what a run folder holds


def run_data(run: Path, name: str) -> dict:
    """A run's log, settings, and what could not be read of them. Raises UserError for a folder that is no run."""
    if not is_folder(run) or not (is_file(run / "config.json") or is_file(run / "training_log.jsonl")):
        raise UserError(f"{run} is no run folder (it has no config.json and no training_log.jsonl): give one from runs/.")
    lines, notes = read_log(run / "training_log.jsonl")
    settings = []
    try:
        settings = changed_settings(read_json(run / "config.json"))
    except (OSError, ValueError) as error:
        notes.append(f"config.json cannot be read ({error}), so the settings are missing here.")
    evals = [line for line in lines if line["kind"] == "eval"]
    first = min(evals, key=lambda line: line["epoch"], default=None)
    return {"name": name, "lines": [page_line(line, first) for line in lines], "settings": settings, "notes": notes}


def read_log(path: Path) -> tuple[list[dict], list[str]]:
    """The log's lines, and a sentence about those that are left out. Of an epoch that was done twice the later lines count."""
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): make it readable, or take another run.") from error
    lines, damaged = {}, []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text, parse_float=number_or_none, parse_constant=number_or_none)
            if not (isinstance(line["kind"], str) and isinstance(line["epoch"], int)):
                raise ValueError("not a line of a training log")
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged.append(number)
            continue
        lines[number if line["kind"] == "start" else key(line)] = line
    notes = [f"Left out of the log, since unreadable: line {', '.join(map(str, damaged))}."] if damaged else []
    return list(lines.values()), notes


def number_or_none(text: str) -> float | None:
    """A number of the log; None for NaN and for one that is too large to be one."""
    value = float(text)
    return value if math.isfinite(value) else None


def key(line: dict) -> tuple:
    return line["kind"], line["epoch"], str(line.get("step"))


def page_line(line: dict, first: dict | None) -> dict:
    """A line as the page needs it: the command as a shell takes it, and instead of the prompts' scores their paired change."""
    if line["kind"] == "start" and isinstance(line.get("command"), list):
        return line | {"command": shlex.join(map(str, line["command"]))}
    if line["kind"] == "eval":
        scores, before = prompt_scores(line), prompt_scores(first)
        changes = {name: paired_change(before[name], scores[name]) for name in scores if name in before}
        return {name: value for name, value in line.items() if name != "scores"} | {"changes": changes, "since": first["epoch"]}
    return line


def prompt_scores(line: dict) -> dict[str, list]:
    """By name, one score a prompt."""
    scores = line.get("scores")
    return {name: values for name, values in scores.items() if isinstance(values, list)} if isinstance(scores, dict) else {}


def paired_change(before: list, after: list) -> dict | None:
    """Mean difference of the same prompts and its standard error; None where the two evaluations had other prompts."""
    both = zip(before, after, strict=True) if len(before) == len(after) else []
    differences = [b - a for a, b in both if is_number(a) and is_number(b)]
    if len(differences) < 2:
        return None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return {"mean": statistics.fmean(differences), "standard_error": error, "prompts": len(differences)}


def is_number(value: object) -> bool:
    """Whether it is a score; one above 1e100, from a log that is none of ours, could not be squared."""
    return isinstance(value, int | float) and abs(value) < 1e100


def changed_settings(config: dict) -> list[dict]:
    """Every setting of a config.json with its value and its preset's, where there is such a preset, as text."""
    preset = PRESETS.get(str(config.get("preset")))
    defaults = flat(config_to_dict(preset)) if preset else {}
    return [{"name": name, "value": value, "preset": defaults.get(name)} for name, value in flat(config).items()]


def flat(config: dict, prefix: str = "") -> dict[str, str]:
    """{"train": {"kl_weight": 0.0}} -> {"train.kl_weight": "0.0"}."""
    settings = {}
    for name, value in config.items():
        if isinstance(value, dict):
            settings |= flat(value, f"{prefix}{name}.")
        else:
            settings[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# sheets of pictures


def sheets(run: Path, kind: str, limit: int) -> dict:
    """Sheets of samples (kind epoch) or of training pairs (kind pairs), of `limit` bytes in all, and the epochs left out."""
    named = {path: re.fullmatch(rf"{kind}-(\d+)\.jpg", path.name) for path in (run / "samples").glob(f"{kind}-*.jpg")}
    found = sorted((int(match[1]), path) for path, match in named.items() if match)
    try:
        kept = spread([path.stat().st_size for _, path in found], limit)
        shown = [{"epoch": found[i][0], "jpeg": base64.b64encode(found[i][1].read_bytes()).decode()} for i in kept]
    except OSError as error:
        raise UserError(f"A sheet in {run / 'samples'} cannot be read ({error.strerror}): make it readable.") from error
    return {"shown": shown, "left_out": [epoch for i, (epoch, _) in enumerate(found) if i not in kept]}


def spread(sizes: list[int], limit: int) -> list[int]:
    """As many indices as fit, evenly spaced from the first to the last; the last alone where no two fit."""
    last = len(sizes) - 1
    for count in range(len(sizes), 1, -1):
        kept = [round(i * last / (count - 1)) for i in range(count)]
        if sum(sizes[i] for i in kept) <= limit:
            return kept
    return [last] if sizes and sizes[last] <= limit else []


if __name__ == "__main__":
    run_command_line(main)
