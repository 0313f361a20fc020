"""Stand-ins for a model that can write: they draw the prompt's text, misspelled in half of the images, and let an engine read it."""

import sys

import torch
from conftest import ROOT

from rewards.scorers.ocr import READERS, OcrScorer

sys.path.insert(0, str(ROOT / "benchmarks"))
from ocr_reading import draw, swapped  # noqa: E402


class Rapid(OcrScorer):
    engine = "ocr"

    def __init__(self, device: torch.device):
        super().__init__(*READERS[self.engine])

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        levels = images.float().mean((1, 2, 3)) / (255 if images.dtype == torch.uint8 else 1)
        texts = [prompt.split('"')[1] for prompt in prompts]
        bright = levels * 100_000 % 2 > 1  # half of the images, whatever they show
        drawn = [draw(text if right else swapped(text), 1) for text, right in zip(texts, bright.tolist(), strict=True)]
        return super().score(prompts, torch.stack(drawn))


class Tesseract(Rapid):
    engine = "ocr_tesseract"
