"""How well `ocr` and `ocr_tesseract` read text that Pillow draws, and how fast.

python benchmarks/ocr_reading.py --metric ocr
"""

import argparse
import os
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from rewards.scorers.ocr import READERS, OcrScorer  # noqa: E402

TEXTS, SIZE = 60, 512
FONTS = (
    ("DejaVuSans.ttf", 32), ("DejaVuSans-Bold.ttf", 48), ("DejaVuSerif.ttf", 40), ("DejaVuSansMono.ttf", 28), ("STIXGeneral.ttf", 56),
)  # fmt: skip
INKS = ("black", "white", "#301010")
FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def background(kind: int) -> Image.Image:
    """Return white paper, a dark wall, or a bright gradient with noise."""
    if kind == 0:
        return Image.new("RGB", (SIZE, SIZE), "white")
    if kind == 1:
        return Image.new("RGB", (SIZE, SIZE), "#203858")
    ramp = np.linspace(150, 240, SIZE)[:, None, None] + np.random.default_rng(0).normal(0, 12, (SIZE, SIZE, 3))
    return Image.fromarray(ramp.clip(0, 255).astype(np.uint8))


def draw(text: str, number: int) -> torch.Tensor:
    """Draw a text with a font and on a background that follow from its number: [3, SIZE, SIZE] uint8."""
    image, (name, size) = background(number % 3), FONTS[number % 5]
    font = ImageFont.truetype(FOLDER / name, size)
    lines = [text] if font.getlength(text) < SIZE - 40 else text.split(" ", 1)
    ImageDraw.Draw(image).multiline_text((20, 60 + 5 * number), "\n".join(lines), fill=INKS[number % 3], font=font)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def swapped(text: str) -> str:
    """Swap two letters that differ, in the middle of a text."""
    places = [i for i in range(len(text) - 1) if " " not in text[i : i + 2] and text[i].casefold() != text[i + 1].casefold()]
    i = places[len(places) // 2]
    return f"{text[:i]}{text[i + 1]}{text[i]}{text[i + 2 :]}"


def texts() -> list[str]:
    """Return the first texts of the prompt set ocr that differ in more than case."""
    prompts = (ROOT / "prompt_sets" / "ocr.txt").read_text().splitlines()
    return list({text.casefold(): text for text in (prompt.split('"')[1] for prompt in prompts)}.values())[:TEXTS]


def cpu_seconds() -> float:
    """Return the CPU time of this process and of the programs that it has called."""
    return sum(os.times()[:4])


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--metric", choices=READERS, default="ocr")
    arguments.add_argument("--threads", type=int, default=2)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    scorer, wanted = OcrScorer(*READERS[options.metric]), texts()
    prompts = [f'a sign that says "{text}"' for text in wanted]
    shown = {
        "clean": wanted, "two letters swapped": [swapped(text) for text in wanted], "another text": wanted[7:] + wanted[:7],
        "blank": [""] * TEXTS,
    }  # fmt: skip
    scorer.score(prompts[:2], torch.stack([draw("warm up", 0)] * 2))
    scores = {}
    for name, drawn in shown.items():
        images = torch.stack([draw(text, number) for number, text in enumerate(drawn)])
        start, own = time.perf_counter(), cpu_seconds()
        scores[name] = scorer.score(prompts, images)
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - own
        below = 100 * (scores[name] < scores["clean"]).float().mean()
        print(
            f"{options.metric}, {name}: mean {scores[name].mean():.1f}, least {scores[name].min():.1f}, most {scores[name].max():.1f}, "
            f"below clean in {below:.0f} % of pairs; {TEXTS / seconds:.1f} images/s on {options.threads} threads, "
            f"{1000 * cpu / TEXTS:.0f} ms of CPU an image"
        )
    for i in (scores["clean"] < 95).nonzero()[:, 0].tolist():
        print(f"  clean at {scores['clean'][i]:.0f}: {wanted[i]!r}, {FONTS[i % 5]}, background {i % 3}")


if __name__ == "__main__":
    main()
