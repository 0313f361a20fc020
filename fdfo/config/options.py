"""Options: frozen dataclasses whose fields declare their bounds, and whether they may change on a resume: one without a mark may not."""

import dataclasses
import json
import typing
from typing import Annotated, ClassVar, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from fdfo.config.errors import UserError

FREE = "free"  # marks a field that does not affect results, so that it may change on a resume
CHANGEABLE = "changeable"  # marks a field that affects results and may yet be changed on a resume, which then says so
T = TypeVar("T", bound="Options")
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
# The name of a model, a file or a scorer, which is written into model cards.
Name = Annotated[str, Field(pattern=r'^[^\x00-\x1f\x7f"`<>|]+$')]


class Options:
    """Base of all options. Tyro makes the command line of them, pydantic checks their types and bounds."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", allow_inf_nan=False, revalidate_instances="always", strict=True)


def check_options(options: Options) -> None:
    """Raise UserError, naming the flag, for the first value outside of its bounds."""
    try:
        TypeAdapter(type(options)).validate_python(options)
    except ValidationError as error:
        flag, value, message = _first(error)
        raise UserError(f"{flag} is {value!r}: {message}.") from error


def _first(error: ValidationError) -> tuple[str, object, str]:
    """Return the flag, the value and the message of the first mistake that pydantic found."""
    first = error.errors()[0]
    flag = flag_of(".".join(part for part in first["loc"] if isinstance(part, str)))
    message = first["msg"].removeprefix("Input ").removeprefix("String ")
    return flag, first["input"], f"it {message}" if message.startswith("should") else message


def flag_of(name: str) -> str:
    """Return the flag of a dotted name."""
    return f"--{name.replace('_', '-')}"


def to_dict(options: Options) -> dict:
    """Return options as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(options), default=str))


def to_json(options: Options) -> str:
    """Return options as JSON text, which from_json reads back."""
    return json.dumps(to_dict(options), indent=2) + "\n"


def from_json(kind: type[T], text: str, source: str) -> T:
    """Read what to_json wrote, and check every value, since the file may be anybody's. Raises UserError, naming the source."""
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        flag, value, message = _first(error)
        raise UserError(
            f"{source} is not a run's config.json of this version ({flag} is {str(value)[:100]!r}: {message}): restore the file or "
            "start a new run."
        ) from error


def deciding_settings(options: Options) -> dict[str, object]:
    """Return, as JSON values by dotted name, the settings that affect results: all but those marked FREE."""
    free = marked(type(options), FREE)
    return {name: value for name, value in flat(to_dict(options)).items() if name not in free}


def marked(kind: type, mark: str, prefix: str = "") -> set[str]:
    """Return the dotted names of the fields with a mark."""
    hints, found = typing.get_type_hints(kind, include_extras=True), set()
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            found |= marked(hints[field.name], mark, f"{prefix}{field.name}.")
        elif mark in getattr(hints[field.name], "__metadata__", ()):
            found.add(prefix + field.name)
    return found


def flat(settings: dict, prefix: str = "") -> dict[str, object]:
    """Return nested settings by dotted name: {"train": {"kl_weight": 0.0}} -> {"train.kl_weight": 0.0}."""
    found = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
