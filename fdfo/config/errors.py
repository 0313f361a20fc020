"""The error that a user sees."""


class UserError(ValueError):
    """A mistake that the user can fix. Its text is one sentence that says what to do; command lines exit with code 2."""


def brief(error: BaseException) -> str:
    """Return an exception as half a line: its type, and the start of its text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
