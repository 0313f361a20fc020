"""The desk: takes pairs and news from the trainer, shows them on the page, keeps the votes."""

import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fdfo.config.errors import UserError
from fdfo.vote_page.access import Access
from fdfo.vote_page.ballot import Ballot, NotYet, Refused, Showing, left_branch
from fdfo.vote_page.images import write_image
from fdfo.vote_page.news import News
from fdfo.vote_page.server import Server
from fdfo.vote_page.votes_file import Vote, VotesFile, pair_values

VOTES, IMAGES = "votes.jsonl", "votes"  # in the run folder
STARTING = "The trainer is starting. Your choice is kept and sent again."
CLOSED = "This epoch is closed: its votes are in use already."


@dataclass(frozen=True)
class DeskSettings:
    """Where the page is served, and what is asked."""

    host: str = "127.0.0.1"
    port: int = 8321  # 0: any free one
    seed: int = 0  # of the run
    epochs: int = 1  # of the whole run
    shown_twice: float = 0.0  # share of the pairs that are shown a second time, to see how steady the choices are


class VoteDesk:
    """Serves the page of a run, in a thread of its own, until close(). Only rank 0 has one; all methods are thread-safe."""

    def __init__(self, run: Path, settings: DeskSettings):
        """run: the run folder. Raises UserError if the port is taken, or votes.jsonl is broken or cannot be written."""
        self.run, self.settings, self.lock = run, settings, threading.RLock()
        self.file = VotesFile(run / VOTES)
        strange = {vote.seed for vote in self.file.votes} - {settings.seed}
        if strange:
            raise UserError(
                f"{run / VOTES} has votes for the seed {strange.pop()}, not {settings.seed}: move it out of the run folder."
            )
        self.images = run / IMAGES
        self.images.mkdir(exist_ok=True)
        self.epoch: int | None = None  # the one opened last
        self.ballot: Ballot | None = None  # of the open epoch
        self.prompts: dict[int, str] = {}  # of the open epoch, by pair
        self.news = News(self.images)
        self.alive = time.monotonic()
        self.boot = secrets.token_hex(4)  # by which a page notices a restart
        self.server = Server(self, Access.make(settings.host, self.images), settings.port)

    @property
    def url(self) -> str:
        """The address of the page; it holds the token if another host than this can reach it."""
        return self.server.url

    def open_epoch(self, epoch: int, total: int) -> None:
        """Open an epoch, counted from 0, of so many pairs. Votes that it has already, from before a restart, count."""
        with self.lock:
            self.ballot = Ballot(self.settings.seed, epoch, total, self.settings.shown_twice, self.file.votes)
            self.epoch, self.prompts = epoch, {}
            self.news.forget_after(epoch)
            self.alive = time.monotonic()

    def offer(self, pair: int, prompt: str, images: torch.Tensor) -> None:
        """Show a pair of the open epoch: images [2, 3, H, W] uint8, branches 0 and 1. One that has its votes is not shown again.

        Raises UserError if the images cannot be written.
        """
        folder = self.images / str(self.epoch)
        for branch, image in enumerate(images):
            write_image(folder / f"{pair}-{branch}.jpg", image)
        with self.lock:
            self.prompts[pair] = prompt
            self.ballot.offer(pair)

    def values(self) -> dict[int, float]:
        """Return R1 - R2 in [-1, 1] of the pairs of the epoch that have a vote: the mean, if a pair was shown twice."""
        with self.lock:
            return pair_values(self.file.votes, self.epoch)

    def left(self) -> int:
        """Return how many showings of the open epoch have no answer yet; 0: all is judged, repeats included."""
        with self.lock:
            return self.ballot.left()

    def last_answer(self) -> float:
        """Return the time (time.monotonic) at which somebody last answered, took back or loaded the page, or the epoch was opened."""
        with self.lock:
            return self.alive

    def close_epoch(self) -> dict[int, float]:
        """Refuse votes for the open epoch from now on, and return its values()."""
        with self.lock:
            values = self.values()
            self.ballot = None
            return values

    def tell(self, stage: str, done: int, total: int, unit: str) -> None:
        """Say what the trainer does now: tell("sampling", 5, 8, "batches")."""
        with self.lock:
            self.news.tell(stage, done, total, unit)

    def tell_evaluation(self, epoch: int, scores: dict[str, float], prompts: list[str], images: torch.Tensor) -> None:
        """Show a held-out evaluation after so many epochs: mean scores by name, and images [n, 3, H, W] uint8 of the prompts [n].

        Each call has the same prompts, so that the page can show before and after. Raises UserError if it cannot be written.
        """
        names = [f"held-out/{epoch}-{i}.jpg" for i in range(len(prompts))]
        for name, image in zip(names, images, strict=True):
            write_image(self.images / name, image)
        with self.lock:
            self.news.add_evaluation(epoch, scores, prompts)

    def close(self) -> None:
        """End the server."""
        self.server.close()

    # What the server's thread asks for. Refused is answered with its sentence.

    def give(self, person: str, tab: str, held: list[tuple[int, int, int]], most: int) -> list[dict]:
        """Return the pairs that a tab shows next; held: (epoch, pair, showing) that it has already."""
        with self.lock:
            if self.ballot is None:
                return []
            mine = [Showing(pair, number) for epoch, pair, number in held if epoch == self.ballot.epoch]
            given = self.ballot.give(tab, person, mine, most, time.monotonic())
            return [self.describe(showing) for showing in given]

    def describe(self, showing: Showing) -> dict:
        """Return what the page needs to show a pair."""
        epoch, pair = self.ballot.epoch, showing.pair
        branches = (0, 1) if left_branch(self.settings.seed, epoch, showing) == "first" else (1, 0)
        left, right = (f"images/{epoch}/{pair}-{branch}.jpg" for branch in branches)
        return {
            "epoch": epoch, "pair": pair, "showing": showing.number, "prompt": self.prompts[pair], "left": left, "right": right,
        }  # fmt: skip

    def vote(self, person: str, tab: str, showing: tuple[int, int, int], choice: str, seconds: float) -> None:
        """Keep a vote; return once it is on the disk. showing: epoch, pair, showing; choice: left, right, tie or both_bad."""
        with self.lock:
            epoch, chosen = showing[0], Showing(*showing[1:])
            self.check_epoch(epoch)
            self.ballot.check(chosen, tab, time.monotonic())
            left = left_branch(self.settings.seed, epoch, chosen)
            right = "second" if left == "first" else "first"
            self.write(chosen, person, {"left": left, "right": right}.get(choice, choice), seconds)
            self.ballot.answer(chosen, tab, person, time.monotonic())

    def take_back(self, person: str, tab: str) -> dict:
        """Take back a person's last vote in the open epoch, and return its pair as give() does."""
        with self.lock:
            self.check_epoch(self.epoch)
            last = self.ballot.last_of(person)
            if last.pair not in self.ballot.offered:
                raise NotYet("That pair is not drawn yet.")
            self.write(last, person, "undo", 0.0)
            self.ballot.take_back(last, tab, time.monotonic())
            return self.describe(last)

    def check_epoch(self, epoch: int | None) -> None:
        """Raise Refused unless this epoch is open."""
        if self.epoch is None:
            raise NotYet(STARTING)
        if self.ballot is None:
            raise Refused(CLOSED)
        if epoch != self.ballot.epoch:
            raise Refused(f"Epoch {epoch + 1} is not open: epoch {self.ballot.epoch + 1} is.")

    def write(self, showing: Showing, person: str, choice: str, seconds: float) -> None:
        """Append a line to votes.jsonl."""
        epoch, seed = self.ballot.epoch, self.settings.seed
        self.alive = time.monotonic()
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        left = left_branch(seed, epoch, showing)
        prompt = self.prompts[showing.pair]
        self.file.append(Vote(seed, epoch, showing.pair, prompt, choice, left, person, showing.number, seconds, now))

    def somebody_came(self) -> None:
        """Note that the page was loaded."""
        with self.lock:
            self.alive = time.monotonic()

    def state(self, tab: str) -> dict:
        """Return what the page shows besides pairs. tab: empty for one where nobody has said a name yet."""
        with self.lock:
            now = time.monotonic()
            if self.ballot is not None and tab:
                self.ballot.see(tab, now)
            return self.news.state() | self.counts(now)

    def counts(self, now: float) -> dict:
        """Return the open epoch in numbers; epoch is None if none is open."""
        ballot, run = self.ballot, {"run": self.run.name, "boot": self.boot, "epochs": self.settings.epochs}
        if ballot is None:
            return run | {"epoch": None, "left": 0, "showings": 0, "people": 0}
        left, showings, people = ballot.left(), len(ballot.showings), ballot.present(now)
        return run | {"epoch": ballot.epoch, "left": left, "showings": showings, "people": people}
