"""Attacks what stands around the training: starts side by side, reports beside a run, damaged logs, full disks.

OMP_NUM_THREADS=1 python tests/hostile.py docs/hostile.md

It takes some ten minutes. The full disks are small tmpfs, which only root can mount; without root they are left out.
"""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from fdfo.config.errors import UserError  # noqa: E402
from fdfo.config.presets import PRESETS  # noqa: E402
from fdfo.run_folder.find_checkpoint import all_checkpoints, read_config  # noqa: E402
from fdfo.run_folder.folder import create_run_folder, run_numbers  # noqa: E402
from fdfo.run_folder.log import LOG  # noqa: E402

RUN = (
    "--preset", "tiny-published", "--total-pairs-per-epoch", "4", "--sample.num-solver-steps", "2", "--eval-prompts", "4", "--eval-every", "1",
    "--save-freq", "1",
)  # fmt: skip
Result = tuple[int, int]  # survived, tried


def start(script: str, *arguments: object) -> subprocess.Popen:
    """Start a command line of the project."""
    command = [sys.executable, *script.split(), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Return exit code and output."""
    out, _ = process.communicate(timeout=600)
    return process.returncode, out


def create_side_by_side(runs_dir: Path, processes: int, times: int) -> Result:
    """Create run folders in the same instant; a right one has a number and a config.json of its own."""
    context = multiprocessing.get_context("fork")
    barrier, mine = context.Barrier(processes), context.Queue()

    def create(number: int) -> None:
        for i in range(times):
            config = replace(PRESETS["tiny-published"], runs_dir=runs_dir, seed=number * times + i, run_name=f"by-{number}")
            barrier.wait()
            try:
                mine.put((config.seed, create_run_folder(config)))
            except UserError:
                mine.put((config.seed, None))

    workers = [context.Process(target=create, args=(number,)) for number in range(processes)]
    for worker in workers:
        worker.start()
    found = [mine.get(timeout=60) for _ in range(processes * times)]
    for worker in workers:
        worker.join()
    right = sum(folder is not None and read_config(folder).seed == seed for seed, folder in found)
    return min(right, len(run_numbers(runs_dir))), len(found)


def train_side_by_side(folder: Path, count: int = 8, rounds: int = 2) -> Result:
    """Start training side by side; a right one ends well, in a folder of its own."""
    for i in range(rounds):
        runs = [start("train.py", *RUN, "--num-epochs", 1, "--seed", count * i + k, "--runs-dir", folder) for k in range(count)]
        for process in runs:
            finish(process)
    whole = [run for run in folder.iterdir() if all_checkpoints(run)]
    return len({read_config(run).seed for run in whole}), count * rounds


def report_beside(folder: Path, epochs: int = 30) -> Result:
    """Write the report from two other processes all the time; survived: the run and every report."""
    training = start("train.py", *RUN, "--num-epochs", epochs, "--runs-dir", folder)
    run, codes = folder / "00000-scene-cfg_1p0", []
    while training.poll() is None and not (run / LOG).exists():
        time.sleep(0.2)
    while training.poll() is None:
        codes += [finish(process)[0] for process in [start("-m fdfo.report", run) for _ in range(2)]]
    codes.append(finish(training)[0])
    return codes.count(0), len(codes)


def mutations(rng: random.Random, content: bytes) -> bytes:
    """Return the content of a log with one mutation."""
    lines, at = content.splitlines(keepends=True), rng.randrange(len(content))
    line = rng.randrange(len(lines))
    values = json.loads(lines[line])
    name = rng.choice([*values])
    renamed = json.dumps({("x" + key if key == name else key): value for key, value in values.items()}).encode() + b"\n"
    return rng.choice(
        [
            content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
            content[:at] + b"\0" * 100 + content[at + 100 :],
            content[:at],
            content[: content.index(b"\n", at) + 1],
            b"",
            b"".join(lines[:line] + lines[line + 1 :]),
            b"".join([*lines[:line], renamed, *lines[line + 1 :]]),
            b"".join(lines[:line] + lines[line:][::-1]),
        ]
    )


def damage_logs(folder: Path, count: int = 40) -> Result:
    """Resume with a damaged log: it ends with one sentence and the log as it is, or with every epoch and evaluation in the log."""
    finish(start("train.py", *RUN, "--num-epochs", 3, "--runs-dir", folder / "first"))
    (original,) = (folder / "first").iterdir()
    rng, survived = random.Random(14), 0
    for i in range(count):
        run = shutil.copytree(original, folder / f"{i:05d}-run", symlinks=True)
        damaged = mutations(rng, (run / LOG).read_bytes())
        (run / LOG).write_bytes(damaged)
        code, out = finish(start("train.py", "--resume-from", run, "--num-epochs", 4))
        if code == 0:
            lines = [json.loads(line) for line in (run / LOG).read_text().splitlines()]
            seen = {kind: [line["epoch"] for line in lines if line["kind"] == kind] for kind in ("epoch", "eval")}
            good = sorted(seen["epoch"]) == [1, 2, 3, 4] and sorted(seen["eval"]) == [0, 1, 2, 3, 4]
        else:
            good = code == 2 and "Traceback" not in out and (run / LOG).read_bytes() == damaged
        survived += good
        if not good:
            print(f"mutation {i} of the log: exit {code}\n{out[-2000:]}")
    return survived, count


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """Mount a tmpfs; yield a function that gives it another size."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


def full_disks(folder: Path, sizes: tuple[str, ...] = ("4k", "1500k", "6m", "12m")) -> Result:
    """Train until the disk is full: one sentence, exit code 2; with room the run goes on to its end, sheets whole."""
    survived = 0
    for size in sizes:
        with small_disk(folder / size, size) as resize:
            command = ("train.py", *RUN, "--num-epochs", 6, "--runs-dir", folder / size / "runs", "--resume-from", "auto")
            code, out = finish(start(*command))
            full = code == 2 and "Traceback" not in out and "cannot be" in out
            resize("100m")
            again, more = finish(start(*command))
            sheets = [*(folder / size).rglob("*.jpg")]
            whole = all(sheet.read_bytes().endswith(b"\xff\xd9") for sheet in sheets)
        survived += full and again == 0 and whole and len(sheets) > 0
        if not (full and again == 0 and whole):
            print(f"disk of {size}: exit {code}, then {again}\n{out[-1500:]}\n{more[-1500:]}")
    return survived, len(sizes)


def full_disks_drawing(folder: Path, sizes: tuple[str, ...] = ("4k", "16k", "64k")) -> Result:
    """Draw images onto a full disk, over a former file: exit code 2, and the former file as it was."""
    survived = 0
    for size in sizes:
        with small_disk(folder / size, size):
            out = folder / size / "o.png"
            out.write_bytes(b"former")
            code, said = finish(start("generate.py", "--preset", "tiny", "--num-inference-steps", 2, "--out", out))
            survived += code == 2 and "cannot be written" in said and out.read_bytes() == b"former"
    return survived, len(sizes)


def main(out: Path) -> None:
    attacks = {
        "8 x 125 run folders created in the same instant": lambda folder: create_side_by_side(folder, 8, 125),
        "8 runs of train.py started side by side, twice": train_side_by_side,
        "reports written by two processes beside a run": report_beside,
        "logs damaged before a resume": damage_logs,
    }
    if os.geteuid() == 0:
        attacks |= {"a run on a disk that fills up": full_disks, "images drawn onto a full disk": full_disks_drawing}
    rows = []
    for name, attack in attacks.items():
        with tempfile.TemporaryDirectory() as folder:
            begin = time.monotonic()
            survived, tried = attack(Path(folder))
            rows.append(f"| {name} | {survived} of {tried} | {time.monotonic() - begin:.0f} |")
            print(rows[-1], flush=True)
    head = ["# What do attacks do?", "", "    OMP_NUM_THREADS=1 python tests/hostile.py docs/hostile.md", ""]
    head += ["The script says what counts as survived. The short form of each attack is in `tests/test_attacks.py`.", ""]
    out.write_text("\n".join([*head, "| attack | survived | seconds |", "| --- | --- | --- |", *rows]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
