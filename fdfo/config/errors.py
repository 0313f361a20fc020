"""The error that a user sees, and how errors are told."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """A mistake that the user can fix. Its text is one sentence that says what to do; command lines exit with code 2."""


def brief(error: BaseException) -> str:
    """Return an exception as half a line: its type, and the start of its text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def or_warn(function: Callable[[], T]) -> T | None:
    """Call a function whose result a run can do without: a UserError becomes a warning, and None is returned."""
    try:
        return function()
    except UserError as error:
        print(f"warning: {error}", flush=True)
        return None
