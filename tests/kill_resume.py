"""Kills a tiny run with SIGKILL at random moments, goes on with --resume-from auto, and compares its end with a run left alone.

OMP_NUM_THREADS=1 python tests/kill_resume.py 50

Every run is a process of its own, forked from one that has imported the libraries. Half of the kills come at a random time,
the others when the process is seen inside a given stage, after a random delay of up to 3 ms.
"""

import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from test_training import comparable  # noqa: E402

import fdfo.method.trainer  # noqa: E402, F401
import train  # noqa: E402
from fdfo.distributed.launch import run_command_line  # noqa: E402

EPOCHS = 6
FLAGS = (
    "--preset", "tiny-published", "--total-pairs-per-epoch", "6", "--sample.num-solver-steps", "4", "--eval-prompts", "2",
    "--eval-every", "2", "--seed", "4", "--num-epochs", str(EPOCHS), "--save-freq", "1", "--keep-last", "2", "--resume-from", "auto",
    "--runs-dir",
)  # fmt: skip
STAGES = {  # function that is on the stack: what the run is doing; the first that matches names it
    "record": "recording an evaluation", "draw_held_out": "evaluate", "score_held_out": "evaluate", "seal": "sealing a checkpoint",
    "remove_folder": "deleting a checkpoint", "save_checkpoint": "writing a checkpoint",
    "create_run_folder": "making the run folder", "reopen_run_folder": "reopening the run folder", "read_state": "reading a checkpoint",
    "encode_prompts": "encode", "sample_share": "sample", "decode": "decode", "score_share": "reward", "optimizer_step": "update",
    "report_epoch": "report", "prepare": "loading", "sample_for_people": "votes",
}  # fmt: skip
AIMS = [*dict.fromkeys(STAGES.values())]
AIMS.remove("reopening the run folder")  # happens in a run that was killed before alone
AIMS.remove("reading a checkpoint")
AIMS.remove("votes")  # kill_votes.py


def names(frame: FrameType | None) -> set[str]:
    """The functions that a stack is inside."""
    found = set()
    while frame is not None:
        found.add(frame.f_code.co_name)
        frame = frame.f_back
    return found


class TinyRun:
    """A forked process that trains, and tells in shared memory what it is doing."""

    flags = FLAGS

    def __init__(self, runs_dir: Path):
        self.place = mmap.mmap(-1, 64)
        self.pid = os.fork()
        if self.pid == 0:
            self.train(runs_dir)

    def train(self, runs_dir: Path) -> None:
        """The child's life."""
        output = os.open(runs_dir.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        threading.Thread(target=self.tell, args=(threading.get_ident(),), daemon=True).start()
        sys.argv = ["train.py", *self.flags, str(runs_dir)]
        code = 1
        try:
            run_command_line(train.main)
            code = 0
        finally:
            os._exit(code)

    def tell(self, main: int) -> None:
        while True:
            inside = names(sys._current_frames()[main])
            place = next((stage for function, stage in STAGES.items() if function in inside), "between stages")
            self.place[:] = place.encode().ljust(64)
            time.sleep(0.0005)

    def seen(self) -> str:
        return self.place[:].rstrip(b"\0 ").decode()

    def kill(self, aim: str | None, after: float, delay: float) -> str | None:
        """Kills the process when `after` seconds have passed and it is seen at its aim; where it was, None if it was through."""
        start = time.monotonic()
        while time.monotonic() - start < after or (aim is not None and self.seen() != aim):
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                return None
            time.sleep(0.0005)
        time.sleep(delay if aim else 0)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return self.seen()

    def end(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def final_files(run: Path) -> list[bytes]:
    folder = run / "checkpoints" / f"epoch-{EPOCHS:07d}"
    files = [
        folder / name
        for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "README.md", "training_state.safetensors")
    ]
    files += [run / "samples" / f"epoch-{epoch:07d}.jpg" for epoch in (0, 2, 4, 6)]
    return [(run / "checkpoints" / "best").readlink().name.encode(), *(file.read_bytes() for file in files)]


def trial(folder: Path, straight: Path, chance: random.Random, aim: str | None, seconds: float) -> tuple[list[str], bool]:
    """One run, killed once, and a second time while it resumes in one of four; where, and whether its end is the same."""
    place = None
    while place is None:  # a run that was through before its moment came is done again
        shutil.rmtree(folder, ignore_errors=True)
        place = TinyRun(folder).kill(aim, chance.uniform(0, seconds * (0.3 if aim else 0.9)), chance.uniform(0, 0.003))
    places = [place]
    if chance.random() < 0.25:
        again = chance.choice(["reopening the run folder", "reading a checkpoint"])
        places.append(TinyRun(folder).kill(again, 0, chance.uniform(0, 0.003)))
    code = TinyRun(folder).end()
    runs = list(folder.glob("0*"))
    same = (
        code == 0
        and len(runs) == 1
        and final_files(runs[0]) == final_files(straight)
        and comparable(runs[0]) == comparable(straight)
    )
    return [place for place in places if place is not None], same


def kill_and_compare(folder: Path, trials: int, seed: int) -> tuple[Counter, int]:
    """Where the kills came, by stage, and how many runs of `trials` ended as the one that was left alone."""
    chance, hits, same = random.Random(seed), Counter(), 0
    start = time.monotonic()
    assert TinyRun(folder / "straight").end() == 0, (folder / "straight.out").read_text()
    seconds = time.monotonic() - start
    (straight,) = (folder / "straight").glob("0*")
    for number in range(trials):
        aim = AIMS[number // 2 % len(AIMS)] if number % 2 else None
        places, as_straight = trial(folder / f"run{number}", straight, chance, aim, seconds)
        hits.update(places)
        same += as_straight
        print(
            f"{number + 1}: killed in {' and '.join(places)}, {'same' if as_straight else 'DIFFERENT'}",
            flush=True,
        )
        if as_straight:
            shutil.rmtree(folder / f"run{number}")
    return hits, same


if __name__ == "__main__":
    count = int(sys.argv[1])
    scratch = Path(tempfile.mkdtemp(prefix="kill_resume_"))
    kills, equal = kill_and_compare(scratch, count, seed=0)
    print(f"\n{equal} of {count} runs ended as the one that was left alone, to the bit (adapter, optimizer, log)")
    print(f"{kills.total()} kills: " + ", ".join(f"{place} {times}" for place, times in kills.most_common()))
    sys.exit(equal != count)
