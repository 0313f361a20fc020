"""A simulated person trains the tiny preset through the real vote page: does the held-out score go up?

python benchmarks/simulated_person.py --out docs/human_simulated.md

For each seed and each share of wrong answers, `train.py --preset tiny --reward-preset human` is started, and a headless Chromium opens its
page. The script reads the prompt from the page, fetches both images that the page shows, scores them with `scene`, and presses the key of
the better one, or that of the worse one in the given share of the pairs. It presses the up arrow if both score the same. The table is
made of the runs' logs: scores of the held-out prompts before and after, and the standard error of their paired difference.
"""

import io
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from playwright.sync_api import Error, Page, sync_playwright

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from fdfo.run_folder.log import LOG, read_log  # noqa: E402
from fdfo.storage.atomic_files import write_text  # noqa: E402
from fdfo.vote_page.desk import VOTES  # noqa: E402
from fdfo.vote_page.votes_file import read_votes, standing  # noqa: E402
from rewards.scorers.scene import SceneScorer  # noqa: E402

KEYS = ("ArrowLeft", "ArrowRight", "ArrowUp")
# What is on the screen: the key of the pair, its prompt, and the addresses of its images.
SEEN = """() => busy || shown === null ? null : [keyOf(shown), document.getElementById("prompt").textContent,
    ...[...document.querySelectorAll(".pair img")].map((image) => image.src)]"""


@dataclass(frozen=True)
class Options:
    out: Path | None = None
    """Markdown file for the table"""
    seeds: tuple[int, ...] = (0, 1, 2)
    wrong: tuple[float, ...] = (0.1, 0.25)
    """shares of wrong answers"""
    flags: str = ""
    """further flags of train.py"""
    runs: Path | None = None
    """folder that keeps the runs"""


@dataclass(frozen=True)
class Outcome:
    """What a run did to the held-out scene score."""

    wrong: float
    seed: int
    votes: int
    ties: int
    before: float
    after: float
    error: float  # standard error of the paired difference
    minutes: float


class Person:
    """Looks at the page and presses keys."""

    def __init__(self, page: Page, wrong: float, seed: int):
        self.page, self.wrong, self.random, self.scorer = page, wrong, random.Random(seed), SceneScorer()

    def judge(self) -> bool:
        """Press the key for the pair on the screen; return whether there was one."""
        seen = self.page.evaluate(SEEN)
        if seen is None or len(seen) < 4:
            return False
        key, prompt, *addresses = seen
        images = torch.stack([self.fetch(address) for address in addresses])
        left, right = self.scorer.score([prompt] * 2, images).tolist()
        worse = self.random.random() < self.wrong
        choice = 2 if left == right else int((left < right) != worse)
        self.page.keyboard.press(KEYS[choice])
        while (now := self.page.evaluate(SEEN)) is not None and now[0] == key:
            self.page.wait_for_timeout(5)
        return True

    def fetch(self, address: str) -> torch.Tensor:
        """Return an image as the browser gets it: [3, H, W] uint8."""
        body = self.page.context.request.get(address).body()
        return torch.from_numpy(np.array(Image.open(io.BytesIO(body)).convert("RGB"))).permute(2, 0, 1)


def train(options: Options, wrong: float, seed: int, runs: Path) -> Outcome:
    """Train one run, judged through its page."""
    name = f"wrong-{wrong}-seed-{seed}".replace(".", "p")
    command = [
        sys.executable,
        "train.py",
        "--preset",
        "tiny",
        "--reward-preset",
        "human",
        "--seed",
        str(seed),
        "--human-port",
        "0",
    ]
    command += ["--runs-dir", str(runs), "--run-name", name, *options.flags.split()]
    start = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as trainer, sync_playwright() as playwright:
        url = next(found[0] for line in trainer.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+/", line)))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.add_init_script("localStorage.setItem('fdfo-person', 'simulated')")
        page.goto(url)
        person = Person(page, wrong, seed)
        while trainer.poll() is None:
            try:
                if not person.judge():
                    page.wait_for_timeout(50)
            except Error as error:  # the run has ended while an image was fetched
                assert "ECONN" in str(error), error
                page.wait_for_timeout(50)
        browser.close()
    assert trainer.returncode == 0, trainer.returncode
    (run,) = runs.glob(f"*-{name}")
    return outcome(run, wrong, seed, (time.monotonic() - start) / 60)


def outcome(run: Path, wrong: float, seed: int, minutes: float) -> Outcome:
    """Read a finished run."""
    votes = standing(read_votes(run / VOTES))
    change = [line for line in read_log(run / LOG)[0] if line["kind"] == "eval"][-1]["changes"]["scene"]
    ties = sum(vote.choice == "tie" for vote in votes)
    return Outcome(wrong, seed, len(votes), ties, change["before"], change["after"], change["error"], minutes)


def table(found: list[Outcome]) -> str:
    """Return a line per run."""
    lines = ["| wrong answers | seed | votes | ties | held-out scene | change | standard errors | minutes |", "| --- " * 8 + "|"]
    for one in found:
        change = one.after - one.before
        lines.append(
            f"| {one.wrong:.0%} | {one.seed} | {one.votes} | {one.ties} | {one.before:.2f} -> {one.after:.2f} | {change:+.1f} +- {one.error:.1f} "
            f"| {change / one.error:.1f} | {one.minutes:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    options, found = tyro.cli(Options), []
    with tempfile.TemporaryDirectory() as folder:
        for wrong in options.wrong:
            for seed in options.seeds:
                found.append(train(options, wrong, seed, options.runs or Path(folder)))
                print(table(found[-1:]).splitlines()[-1], flush=True)
                if options.out is not None:
                    write_text(options.out, table(found))


if __name__ == "__main__":
    main()
