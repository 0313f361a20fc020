"""config.json: a frozen config as JSON, and back with every value checked, since the file may be anybody's."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Literal

from fdfo.config import TrainConfig, UserError


def config_to_json(config: object) -> str:
    """A frozen config dataclass as JSON text; config_from_json reads it back."""
    return json.dumps(config_to_dict(config), indent=2) + "\n"


def config_to_dict(config: object) -> dict:
    """A frozen config dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def config_from_json(text: str, source: str) -> TrainConfig:
    """The TrainConfig that config_to_json wrote. Raises UserError, naming the source, for anything else."""
    try:
        return _build(TrainConfig, json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{source} is not a run's config.json of this version ({error}): restore the file or start a new run."
        ) from error


def of_type(value: object, wanted: object) -> bool:
    """Whether a value from JSON is of a config field's type: a plain type, a union, a Literal, or a tuple of strings."""
    if typing.get_origin(wanted) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if typing.get_origin(wanted) is Literal:
        return value in typing.get_args(wanted)
    if choices := typing.get_args(wanted):
        return any(of_type(value, choice) for choice in choices)
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))


def _build(kind: type, values: dict):
    if not isinstance(values, dict):
        raise ValueError(f"{values!r} stands where {kind.__name__} should")
    fields = typing.get_type_hints(kind)
    unknown = set(values) - set(fields)
    if unknown:
        raise ValueError(f"unknown entries {sorted(unknown)}")
    arguments = {}
    for name, value in values.items():
        wanted = fields[name]
        if dataclasses.is_dataclass(wanted):
            value = _build(wanted, value)
        elif wanted is Path:
            value = Path(value)
        elif isinstance(value, list):
            value = tuple(value)
        if not dataclasses.is_dataclass(wanted) and not of_type(value, wanted):
            raise ValueError(f"{name} is {value!r}")
        arguments[name] = value
    return kind(**arguments)
