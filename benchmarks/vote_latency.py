"""Milliseconds from the key to the next pair on the screen of the vote page, in a headless Chromium.

python benchmarks/vote_latency.py                    # 100 votes on pairs of 512 x 512
python benchmarks/vote_latency.py --busy             # while this process also multiplies matrices, as a trainer would on the CPU

The time runs from the browser's time stamp of the key to the second animation frame after the new images are in the page. The vote is
on the disk within it. The script presses a key every --pause milliseconds.
"""

import shutil
import statistics
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from fdfo.vote_page.desk import DeskSettings, VoteDesk  # noqa: E402

# Notes in window.times, for each key, how long it took until both new images were on the screen.
STOPWATCH = """
window.times = [];
let pressed = null;
addEventListener("keydown", (event) => { pressed = event.timeStamp; }, true);
addEventListener("DOMContentLoaded", () => {
  new MutationObserver(() => {
    if (pressed === null) return;
    const start = pressed;
    pressed = null;
    requestAnimationFrame(() => requestAnimationFrame(() => window.times.push(performance.now() - start)));
  }).observe(document.querySelector(".pair button:last-child"), { childList: true });
});
"""


@dataclass(frozen=True)
class Options:
    votes: int = 100
    size: int = 512
    """side of the images, pixels"""
    pause: int = 300
    """milliseconds between a pair on the screen and the key"""
    busy: bool = False
    """keep the CPU busy as a trainer would"""


def picture_like(pair: int, size: int) -> torch.Tensor:
    """Return two images [2, 3, size, size] uint8 of smooth colours and grain, whose JPEG is as large as a photograph's."""
    generator = torch.Generator().manual_seed(pair)
    smooth = torch.nn.functional.interpolate(torch.rand(2, 3, 8, 8, generator=generator), (size, size), mode="bicubic")
    grain = 0.04 * torch.randn(2, 3, size, size, generator=generator)
    return (255 * (smooth + grain).clamp(0, 1)).to(torch.uint8)


def times(page: Page, options: Options) -> list[float]:
    """Vote, always for the left image; return the milliseconds of each vote."""
    for vote in range(options.votes):
        page.wait_for_timeout(options.pause)
        page.keyboard.press("ArrowLeft")
        while page.evaluate("window.times.length") <= vote:
            page.wait_for_timeout(5)
    return page.evaluate("window.times")


def load(stop: threading.Event) -> None:
    """Multiply matrices until told to stop."""
    matrix = torch.rand(1024, 1024)
    while not stop.is_set():
        torch.mm(matrix, matrix)


def main() -> None:
    options, stop = tyro.cli(Options), threading.Event()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        desk = VoteDesk(Path(folder), DeskSettings(port=0))
        desk.open_epoch(0, options.votes + 1)
        for pair in range(options.votes + 1):
            desk.offer(pair, f"a pair of images, number {pair}", picture_like(pair, options.size))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.add_init_script(STOPWATCH + "localStorage.setItem('fdfo-person', 'stopwatch');")
        page.goto(desk.url)
        page.locator(".pair img").first.wait_for()
        thread = threading.Thread(target=load, args=(stop,))
        if options.busy:
            thread.start()
        found = times(page, options)
        stop.set()
        browser.close()
        kept = len(desk.file.votes)
        desk.close()
    assert kept == options.votes, kept
    tenths = statistics.quantiles(found, n=10)
    print(
        f"key to next pair, {options.votes} votes, images {options.size} x {options.size}{', CPU busy' if options.busy else ''}: "
        f"median {statistics.median(found):.0f} ms, 90 % under {tenths[-1]:.0f} ms, longest {max(found):.0f} ms"
    )


if __name__ == "__main__":
    main()
