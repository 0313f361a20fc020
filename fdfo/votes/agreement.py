"""Counts votes: per person, how many of which kind, on which side, how steadily, and how often a scorer agrees."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from fdfo.vote_page.votes_file import VALUES, Vote, standing

EVERYBODY = "all"


@dataclass(frozen=True)
class Share:
    """So many out of so many."""

    hits: int
    count: int

    @property
    def error(self) -> float:
        """Standard error of the share; NaN without any."""
        share = self.hits / self.count if self.count else math.nan
        return math.sqrt(share * (1 - share) / self.count) if self.count else math.nan

    @property
    def short(self) -> str:
        return f"{100 * self.hits / self.count:.0f} %" if self.count else "-"

    def __str__(self) -> str:
        return f"{100 * self.hits / self.count:.0f} +- {100 * self.error:.1f} %" if self.count else "-"


@dataclass(frozen=True)
class Habits:
    """How one person votes, or all together. Decided votes are those for one of the two images."""

    person: str
    votes: int
    ties: Share
    both_bad: Share
    taken_back: int
    seconds: float  # median
    left: Share  # of the decided votes: those for the image on the left
    again: Share  # of the pairs shown twice to the same person: the same choice both times
    scorer: Share  # of the decided votes on which the scorer is decided too: the same choice


def habits(person: str, votes: list[Vote], scores: dict[tuple[int, int], float]) -> Habits:
    """Count the votes of a person, those taken back included. scores: a scorer's difference R1 - R2 by (epoch, pair)."""
    valid = standing(votes)
    decided = [vote for vote in valid if vote.choice in ("first", "second")]
    scored = [
        (vote, score) for vote in decided if (score := scores.get((vote.epoch, vote.pair), 0.0)) != 0 and math.isfinite(score)
    ]
    twice = repeats(valid)
    return Habits(
        person,
        len(valid),
        Share(sum(vote.choice == "tie" for vote in valid), len(valid)),
        Share(sum(vote.choice == "both_bad" for vote in valid), len(valid)),
        len(votes) - sum(vote.choice != "undo" for vote in votes),
        statistics.median([vote.seconds for vote in valid] or [math.nan]),
        Share(sum(vote.choice == vote.left for vote in decided), len(decided)),
        Share(sum(a.choice == b.choice for a, b in twice if a.person == b.person), sum(a.person == b.person for a, b in twice)),
        Share(sum((score > 0) == (vote.choice == "first") for vote, score in scored), len(scored)),
    )


def repeats(votes: Iterable[Vote]) -> list[tuple[Vote, Vote]]:
    """Return the two votes on each pair that was shown twice."""
    found: dict[tuple[int, int], dict[int, Vote]] = {}
    for vote in votes:
        found.setdefault((vote.epoch, vote.pair), {})[vote.showing] = vote
    return [(both[1], both[2]) for both in found.values() if len(both) == 2]


def between_people(votes: Iterable[Vote]) -> Share:
    """Return, of the pairs shown twice to two people, those on which they chose the same."""
    twice = [(a, b) for a, b in repeats(standing(votes)) if a.person != b.person]
    return Share(sum(VALUES[a.choice] == VALUES[b.choice] for a, b in twice), len(twice))


def everybodys_habits(votes: list[Vote], scores: dict[tuple[int, int], float]) -> list[Habits]:
    """Return the habits of each person, in the order in which they came, and of all together if there are several."""
    people = list(dict.fromkeys(vote.person for vote in votes))
    rows = [habits(person, [vote for vote in votes if vote.person == person], scores) for person in people]
    return rows if len(people) == 1 else [*rows, habits(EVERYBODY, votes, scores)]


def table(rows: list[Habits], scorer: str | None) -> str:
    """Return a line per person."""
    columns = ["person", "votes", "tie", "both bad", "taken back", "seconds", "left", "again"] + [f"like {scorer}"] * (
        scorer is not None
    )
    cells = [columns]
    for row in rows:
        line = [row.person, str(row.votes), row.ties.short, row.both_bad.short, str(row.taken_back), f"{row.seconds:.1f}"]
        cells.append(line + [f"{row.left}", f"{row.again} of {row.again.count}"] + [f"{row.scorer}"] * (scorer is not None))
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    )


def warnings(rows: list[Habits]) -> list[str]:
    """Warn of a person who prefers a side: by more than 3 standard errors, though sides are drawn at random."""
    lines = []
    for row in rows:
        fair = 0.5 / math.sqrt(max(1, row.left.count))
        if row.left.count and abs(row.left.hits / row.left.count - 0.5) > 3 * fair and row.person != EVERYBODY:
            lines.append(
                f"{row.person} chooses the left image in {row.left} of the decided votes, though sides are drawn at random"
            )
    return lines
