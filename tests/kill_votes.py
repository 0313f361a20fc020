"""Kills a run that people judge with SIGKILL again and again, and compares its end with a run from its votes that was left alone.

OMP_NUM_THREADS=1 python tests/kill_votes.py 10

The kills come after a random number of votes and a random time, so between two votes, while a vote is kept, or while the run trains.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

from kill_resume import TinyRun  # first: it sets the paths
from test_training import comparable
from voters import Voter, free_port

from fdfo.vote_page.votes_file import read_votes

EPOCHS, PAIRS = 4, 6
FLAGS = (
    "--preset", "tiny", "--reward-preset", "human", "--total-pairs-per-epoch", str(PAIRS), "--sample.num-solver-steps", "4",
    "--num-epochs", str(EPOCHS), "--eval-prompts", "2", "--eval-every", "2", "--eval-metrics", "scene", "--resume-from", "auto",
)  # fmt: skip


class JudgedRun(TinyRun):
    """A forked run that people judge."""

    def __init__(self, runs_dir: Path, *more: object):
        self.flags = (*FLAGS, *map(str, more), "--runs-dir")
        super().__init__(runs_dir)


def votes_until(voter: Voter, most: int, seconds: float) -> None:
    """Vote until there are `most` votes in all and some time has passed, or the page has been gone for long."""
    gone = time.monotonic() + 60
    while len(voter.kept) < most:
        try:
            busy = voter.vote(most)
            gone = time.monotonic() + 60
        except OSError:
            busy = False
            assert time.monotonic() < gone, "no page"
        time.sleep(0 if busy else 0.02)
    time.sleep(seconds)


def kill_and_compare(folder: Path, kills: int, seed: int) -> bool:
    """Whether no vote was lost or counted twice, and the end is that of a run from the votes that was left alone."""
    chance, port = random.Random(seed), free_port()
    voter = Voter(f"http://127.0.0.1:{port}/")
    for after in sorted(chance.randrange(EPOCHS * PAIRS) for _ in range(kills)):
        run = JudgedRun(folder / "killed", "--human-port", port)
        later = chance.choice([0.0, chance.uniform(0, 0.1), chance.uniform(0, 1.5)])
        votes_until(voter, after - lost_answers(voter, folder / "killed"), later)
        place = run.kill(None, 0, 0)
        print(f"killed after {len(voter.kept)} votes in {place}", flush=True)
    run = JudgedRun(folder / "killed", "--human-port", port)
    votes_until(voter, EPOCHS * PAIRS - lost_answers(voter, folder / "killed"), 0)
    assert run.end() == 0, (folder / "killed.out").read_text()[-3000:]
    (killed,) = (folder / "killed").glob("0*")
    votes = [(vote.epoch, vote.pair, vote.showing) for vote in read_votes(killed / "votes.jsonl")]
    assert JudgedRun(folder / "straight", "--votes", killed / "votes.jsonl").end() == 0, (folder / "straight.out").read_text()[
        -3000:
    ]
    (straight,) = (folder / "straight").glob("0*")
    end = f"checkpoints/epoch-{EPOCHS:07d}"
    same = [
        (killed / end / name).read_bytes() == (straight / end / name).read_bytes()
        for name in ("adapter_model.safetensors", "training_state.safetensors")
    ]
    once = sorted(votes) == [(epoch, pair, 1) for epoch in range(EPOCHS) for pair in range(PAIRS)]
    print(f"{len(votes)} votes, each pair once: {once}; all that were answered are there: {set(voter.kept) <= set(votes)}")
    print(f"adapter and optimizer equal to the bit: {all(same)}; log: {comparable(killed) == comparable(straight)}")
    return once and set(voter.kept) <= set(votes) and all(same) and comparable(killed) == comparable(straight)


def lost_answers(voter: Voter, runs_dir: Path) -> int:
    """How many votes are on the disk whose answer a kill kept from the voter."""
    return sum(len(read_votes(path)) for path in runs_dir.glob("0*/votes.jsonl")) - len(voter.kept)


if __name__ == "__main__":
    sys.exit(not kill_and_compare(Path(tempfile.mkdtemp(prefix="kill_votes_")), int(sys.argv[1]), seed=0))
