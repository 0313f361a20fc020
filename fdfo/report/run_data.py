"""What a run folder holds, as the report shows it: lines of the log, settings, sheets of images."""

import base64
import json
import os
import re
from functools import cached_property
from pathlib import Path

from fdfo.config.errors import UserError
from fdfo.config.options import flag_of, flat, to_dict
from fdfo.config.presets import PRESETS
from fdfo.run_folder.find_checkpoint import CONFIG
from fdfo.run_folder.log import LOG, read_log
from fdfo.storage.atomic_files import read_json

MOST_SHEETS = 40  # of each kind that a page holds
TYPES = {
    "means": dict,
    "standard_errors": dict,
    "changes": dict,
    "held_out": list,
    "warnings": list,
    "command": list,
    "changed": dict,
}
EPOCH_TYPES = TYPES | {"scores": dict, "seconds": dict}  # in an evaluation's line seconds is one number


class Run:
    """A run's log by kind and its settings {name: (value, the preset's value)}. notes: sentences on what could not be read."""

    def __init__(self, folder: Path, name: str):
        """Raises UserError for a folder that is no run."""
        if not any(os.path.isfile(folder / name) for name in (CONFIG, LOG)):
            raise UserError(f"{folder} is no run folder (it has no config.json and no training_log.jsonl): give one from runs/.")
        self.name, self.settings = name, {}
        lines, unreadable = read_log(folder / LOG)
        self.lines = newest_of(lines)
        self.notes = [f"Left out of the log, since unreadable: line {', '.join(map(str, unreadable))}."] if unreadable else []
        try:
            self.settings = read_settings(folder / CONFIG)
        except (OSError, ValueError) as error:
            self.notes.append(f"config.json cannot be read ({error}), so the settings are missing here.")
        self.epochs, self.evals, self.starts = (self.kind(kind) for kind in ("epoch", "eval", "start"))
        self.notes += [note for line in self.starts for note in changes_of(line)]
        self.unseen = {str(name) for line in self.evals for name in line.get("held_out", [])}  # scorers not trained on
        best = [line["best"] for line in self.evals if number(line.get("best")) is not None][-1:]
        self.best = next((line for line in self.evals if [line["epoch"]] == best), None)

    def kind(self, kind: str) -> list[dict]:
        """Return the lines of a kind by rising epoch, without values of a type that this version does not write."""
        types = EPOCH_TYPES if kind == "epoch" else TYPES
        lines = sorted((line for line in self.lines if line["kind"] == kind), key=lambda line: line["epoch"])
        return [{name: value for name, value in line.items() if isinstance(value, types.get(name, object))} for line in lines]

    @cached_property
    def steps(self) -> dict[int, list[dict]]:
        """The lines of the optimizer steps by epoch."""
        found: dict[int, list[dict]] = {}
        for line in self.kind("step"):
            found.setdefault(line["epoch"], []).append(line)
        return found

    @cached_property
    def metrics(self) -> list[str]:
        """The evaluated names: the reward, then what is trained on, then the rest."""
        names = dict.fromkeys(name for line in self.evals for name in line.get("means", {}))
        return sorted(names, key=lambda name: 0 if name == "reward" else 2 if name in self.unseen else 1)

    @cached_property
    def whole_reward(self) -> str | None:
        """The scorer that is the whole reward, where there is one."""
        means = [line.get("means", {}) for line in self.evals]
        names = (name for name in self.metrics if name != "reward")
        same = (
            name for name in names if "reward" in self.metrics and all(mean.get(name) == mean.get("reward") for mean in means)
        )
        return next(same, None)


def changes_of(line: dict) -> list[str]:
    """Return a sentence for every setting that a start of the run has changed."""
    pairs = [(name, pair) for name, pair in line.get("changed", {}).items() if isinstance(pair, list) and len(pair) == 2]
    return [f"From epoch {line['epoch'] + 1} on {flag_of(name)} is {now}; it was {before}." for name, (before, now) in pairs]


def number(value: object) -> float | None:
    """Return a number of the log, or None for anything that is no usable number."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100
    return float(value) if usable else None


def newest_of(lines: list[dict]) -> list[dict]:
    """Return the lines of a log without those of an epoch that was done again later."""
    newest = {
        (i,) if line["kind"] == "start" else (line["kind"], line["epoch"], str(line.get("step"))): line
        for i, line in enumerate(lines)
    }
    return list(newest.values())


def read_settings(path: Path) -> dict[str, tuple[str, str | None]]:
    """Return every setting of a config.json as text, beside its preset's value where there is such a preset."""
    config = read_json(path)
    preset = PRESETS.get(str(config.get("preset")))
    defaults = flat(to_dict(preset)) if preset else {}
    return {name: (as_text(value), as_text(defaults[name]) if name in defaults else None) for name, value in flat(config).items()}


def as_text(value: object) -> str:
    """Return a setting as text."""
    return value if isinstance(value, str) else json.dumps(value)


def read_sheets(folder: Path, kind: str) -> tuple[list[tuple[int, str]], int]:
    """Return evenly spread sheets of a kind, each with its epoch and JPEG in base64, and how many are left out."""
    named = {path: re.fullmatch(rf"{kind}-(\d+)\.jpg", path.name) for path in (folder / "samples").glob(f"{kind}-*.jpg")}
    found = sorted((int(match[1]), path) for path, match in named.items() if match)
    count = min(len(found), MOST_SHEETS)
    kept = [found[round(i * (len(found) - 1) / max(1, count - 1))] for i in range(count)]
    try:
        return [(epoch, base64.b64encode(path.read_bytes()).decode()) for epoch, path in kept], len(found) - count
    except OSError as error:
        raise UserError(f"A sheet in {folder / 'samples'} cannot be read ({error.strerror}): make it readable.") from error
