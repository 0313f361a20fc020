"""Which pair of an epoch goes to whom. Plain rules: no web, no disk, and the time is an argument.

A showing is a pair on somebody's screen. A showing goes to one tab of a browser; it is free for others again if that tab answers
nothing for PATIENCE, or is gone for GONE. Some pairs are shown a second time, once all pairs were offered. Sides and repeats are
functions of (seed, epoch, pair), so that they are the same after a restart.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fdfo.vote_page.votes_file import Vote, standing

PATIENCE = 120.0  # seconds for which a tab keeps its pairs without an answer
GONE = 15.0  # seconds after which a tab that asks nothing any more is taken for closed


class Refused(ValueError):
    """What a person cannot do now. Its text is one sentence for them."""


class NotYet(Refused):
    """What a person can do in a moment: the page asks again by itself."""


class Showing(NamedTuple):
    pair: int
    number: int  # 1, or 2 if the pair is shown again


@dataclass
class Lease:
    """A showing is with a tab; time of its last answer, or of the start."""

    tab: str
    since: float


def uniform(*key: object) -> float:
    """Return a number in [0, 1) that is a function of the key alone."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:6]) / 2**48


def left_branch(seed: int, epoch: int, showing: Showing) -> Literal["first", "second"]:
    """Return which branch of the pair is on the left."""
    return "first" if uniform("side", seed, epoch, *showing) < 0.5 else "second"


class Ballot:
    """The pairs of one epoch: which are offered, who has them, and which are answered."""

    def __init__(self, seed: int, epoch: int, total: int, shown_twice: float, votes: Iterable[Vote] = ()):
        """total: pairs of the epoch; shown_twice: share of them that are shown again; votes: those from before a restart."""
        self.epoch, self.total = epoch, total
        again = (pair for pair in range(total) if uniform("again", seed, epoch, pair) < shown_twice)
        self.showings = {Showing(pair, 1) for pair in range(total)} | {Showing(pair, 2) for pair in again}
        self.offered: dict[int, None] = {}  # in the order in which they came
        here = (vote for vote in votes if vote.epoch == epoch)
        self.answered = {Showing(vote.pair, vote.showing): vote.person for vote in standing(here)}
        self.leases: dict[Showing, Lease] = {}
        self.seen: dict[str, float] = {}

    def offer(self, pair: int) -> None:
        self.offered[pair] = None

    def left(self) -> int:
        """Return how many showings of the epoch have no answer yet, those of pairs that are still to come included."""
        return len(self.showings - self.answered.keys())

    def open_showings(self, person: str) -> list[Showing]:
        """Return the showings to be answered, in order: new pairs, then repeats, a person's own first."""
        new = [Showing(pair, 1) for pair in self.offered]
        first = [showing for showing in self.answered if showing.number == 1 and len(self.offered) == self.total]
        first.sort(key=lambda showing: self.answered[showing] != person)
        again = [Showing(pair, 2) for pair, _ in first]
        return [showing for showing in new + again if self.is_open(showing)]

    def is_open(self, showing: Showing) -> bool:
        return showing.pair in self.offered and showing in self.showings and showing not in self.answered

    def holder(self, showing: Showing, now: float) -> str | None:
        """Return the tab that has the showing, None if it is free."""
        lease = self.leases.get(showing)
        if lease is None or now - lease.since > PATIENCE or now - self.seen.get(lease.tab, lease.since) > GONE:
            return None
        return lease.tab

    def see(self, tab: str, now: float) -> None:
        """Note that a tab is there."""
        self.seen[tab] = now

    def present(self, now: float) -> int:
        """Return how many tabs are there."""
        return sum(now - seen <= GONE for seen in self.seen.values())

    def give(self, tab: str, person: str, held: list[Showing], most: int, now: float) -> list[Showing]:
        """Return at most so many showings for a tab, those that it holds already first. Time that has run out starts with an answer.

        After a restart a tab also keeps what it held and is not offered yet.
        """
        self.see(tab, now)
        kept = [showing for showing in held if showing in self.showings and showing not in self.answered]
        wanted = dict.fromkeys([*kept, *self.open_showings(person)])
        free = [showing for showing in wanted if self.holder(showing, now) in (None, tab)][:most]
        for showing in free:
            if showing not in self.leases or self.leases[showing].tab != tab:
                self.leases[showing] = Lease(tab, now)
        return [showing for showing in free if self.is_open(showing)]

    def check(self, showing: Showing, tab: str, now: float) -> None:
        """Raise Refused unless a tab may answer a showing now."""
        if showing in self.answered:
            raise Refused("This pair has its vote already.")
        if showing in self.showings and showing.pair not in self.offered:
            raise NotYet("This pair is not drawn yet. Your choice is kept and sent again.")
        if not self.is_open(showing):
            raise Refused("This pair is not open.")
        if self.holder(showing, now) not in (None, tab):
            raise Refused("This pair is with someone else now.")

    def answer(self, showing: Showing, tab: str, person: str, now: float) -> None:
        """Note the answer of a showing, which check allows. The tab's other pairs stay with it."""
        self.see(tab, now)
        self.answered[showing] = person
        self.leases.pop(showing, None)
        for lease in self.leases.values():
            if lease.tab == tab:
                lease.since = now

    def last_of(self, person: str) -> Showing:
        """Return the showing that a person answered last. Raises Refused if there is none in this epoch."""
        own = [showing for showing, who in self.answered.items() if who == person]
        if not own:
            raise Refused("You have no vote in this epoch to take back.")
        return own[-1]

    def take_back(self, showing: Showing, tab: str, now: float) -> None:
        """Note that an answer was taken back; the showing is with the tab again."""
        self.see(tab, now)
        del self.answered[showing]
        self.leases[showing] = Lease(tab, now)
