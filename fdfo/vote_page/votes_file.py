"""votes.jsonl: every choice of a person, one JSON object a line, on the disk before the page shows the next pair."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from fdfo.config.errors import UserError
from fdfo.storage.atomic_files import sync

VALUES = {"first": 1.0, "second": -1.0, "tie": 0.0, "both_bad": 0.0}  # R1 - R2 of a choice
Number = Annotated[int, Field(ge=0)]
Person = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[^\x00-\x1f\x7f]+$")]


@dataclass(frozen=True)
class Vote:
    """One line: what a person chose, or that they took their last choice on this showing back (undo)."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    seed: Number
    epoch: Number  # from 0
    pair: Number  # index in the epoch, over all processes
    prompt: str
    choice: Literal["first", "second", "tie", "both_bad", "undo"]  # first, second: branches 0 and 1 of the pair
    left: Literal["first", "second"]  # which branch was on the left
    person: Person
    showing: Annotated[int, Field(ge=1, le=2)]  # 2: the pair was shown for the second time
    seconds: Annotated[float, Field(ge=0)]  # from the pair on the screen to the key
    time: str  # UTC, 2026-01-01T00:00:00Z


PARSER = TypeAdapter(Vote)


def read_votes(path: Path) -> list[Vote]:
    """Read all lines of a file of votes, also those that were taken back later (see standing).

    The unfinished last line that a kill leaves is dropped. Raises UserError for a file that cannot be read, and for any other
    broken line, naming it.
    """
    return _parse(path)[0]


def _parse(path: Path) -> tuple[list[Vote], bytes]:
    """Return the votes, and the content of the file without an unfinished last line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a file of votes, such as RUN/votes.jsonl.") from error
    *lines, last = content.split(b"\n")
    votes = []
    for number, line in enumerate(lines, start=1):
        try:
            votes.append(PARSER.validate_json(line))
        except ValidationError as error:
            raise UserError(f"Line {number} of {path} is no vote ({_mistake(error)}): restore or delete that line.") from None
    try:
        return [*votes, PARSER.validate_json(last)], content + b"\n"  # whole, and only its end of line is missing
    except ValidationError:
        return votes, content.removesuffix(last)


def _mistake(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"


def standing(votes: Iterable[Vote]) -> list[Vote]:
    """Return the votes that nobody took back, in their order. An undo takes back this person's last vote on that showing."""
    left: list[Vote] = []
    for vote in votes:
        if vote.choice != "undo":
            left.append(vote)
            continue
        taken = (vote.epoch, vote.pair, vote.showing, vote.person)
        for i in reversed(range(len(left))):
            if (left[i].epoch, left[i].pair, left[i].showing, left[i].person) == taken:
                del left[i]
                break
    return left


def pair_values(votes: Iterable[Vote], epoch: int) -> dict[int, float]:
    """Return the value R1 - R2 in [-1, 1] of each pair of an epoch that has a vote: the mean of its standing votes."""
    found: dict[int, list[float]] = {}
    for vote in standing(vote for vote in votes if vote.epoch == epoch):
        found.setdefault(vote.pair, []).append(VALUES[vote.choice])
    return {pair: sum(values) / len(values) for pair, values in sorted(found.items())}


class VotesFile:
    """The votes of a run while it runs: those that are there, and new ones. One process writes."""

    def __init__(self, path: Path):
        """Raises UserError as read_votes does; a file that is not there yet is empty."""
        self.path = path
        self.votes, content = _parse(path) if path.exists() else ([], b"")
        try:
            path.touch()
            sync(path.parent)
            self.size = 0
            self._write(content)
        except OSError as error:
            raise self._unwritable(error) from error

    def append(self, vote: Vote) -> None:
        """Add a vote; return once it is on the disk. Raises UserError if it cannot be; the file then is as before."""
        try:
            self._write((json.dumps(asdict(vote)) + "\n").encode())
        except OSError as error:
            raise self._unwritable(error) from error
        self.votes.append(vote)

    def _write(self, line: bytes) -> None:
        """Write at the end of what is known to be whole, over what a failed or killed write left there."""
        with self.path.open("r+b") as file:
            file.seek(self.size)
            file.write(line)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self.size += len(line)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.path} cannot be written ({error.strerror}): make room, or restore the folder.")
