"""What a question over HTTP costs: images a second of a scorer that costs nothing, in another process on this machine.

python benchmarks/http_scorer.py
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from rewards.remote.http import HttpScorer  # noqa: E402

COUNT, SIZE, REPEATS = 100, 512, 5


class Nothing:
    """A scorer that costs nothing."""

    def __init__(self, device: torch.device):
        pass

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 0, 0].float()


def smooth(count: int) -> torch.Tensor:
    """Return images with large areas, as a flow model draws them: [N, 3, SIZE, SIZE]."""
    coarse = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    fine = 0.02 * torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return (torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic") + fine).clamp(0, 1)


def main() -> None:
    command = [sys.executable, "-m", "rewards.serve", "benchmarks.http_scorer:Nothing", "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+/score", server.stdout.readline())[0]
        scorer = HttpScorer(url)
        noise = torch.rand(COUNT, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        for name, images in (("noise", noise), ("smooth with a little noise", smooth(COUNT))):
            scorer.score(["warm up"] * 8, images[:8])
            seconds, own = [], time.process_time()
            for _ in range(REPEATS):
                start = time.perf_counter()
                scorer.score(["a caption of a few words"] * COUNT, images)
                seconds.append(time.perf_counter() - start)
            cpu = (time.process_time() - own) / REPEATS
            print(
                f"{COUNT} images of {SIZE} x {SIZE}, {name}: {min(seconds):.2f} to {max(seconds):.2f} s, {cpu:.2f} s of CPU here"
            )
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
