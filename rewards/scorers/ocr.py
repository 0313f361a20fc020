"""`ocr` and `ocr_tesseract`: how well the text that a prompt puts in quotation marks can be read in its image, after Flow-GRPO."""

import io
import os
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from fdfo.config.errors import UserError
from fdfo.model.images import quantised

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')
SHORT_SIDE = 512  # pixels to which smaller images are enlarged before text is looked for
TESSERACT_SECONDS = 60.0  # for one image
Reader = Callable[[np.ndarray], list[str]]  # image [H, W, 3] uint8 -> the lines in it, from top to bottom


class OcrScorer:
    """100 (1 - d / length), at least 0; the mean over the texts if a prompt quotes several.

    d is the edit distance between the text and the lines next to each other in the image that match it best; it is 0 if they
    contain the text. Case, blanks and the width of letters do not count.
    """

    def __init__(self, name: str, make_reader: Callable[[], Reader]):
        """make_reader: called for each of the threads that read, as many as PyTorch uses (OMP_NUM_THREADS). Raises UserError."""
        self.description = f"text in quotation marks, as {name} reads it"
        self.readers = [make_reader() for _ in range(torch.get_num_threads())]

    def check_prompts(self, prompts: list[str]) -> None:
        """Raise UserError for a prompt that quotes no text."""
        for prompt in prompts:
            if not quoted_texts(prompt):
                raise UserError(
                    f'The prompt {prompt[:200]!r} has no text in quotation marks: write such as a sign that says "open", or use '
                    "--prompt-set ocr."
                )

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        """Score prompts [N], images [N, 3, H, W] float in [0, 1] or uint8 -> [N] float32 in [0, 100]. Raises UserError."""
        pixels = images if images.dtype == torch.uint8 else quantised(images)
        arrays = list(pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy())

        def read(number: int) -> list[list[str]]:
            return [self.readers[number](array) for array in arrays[number :: len(self.readers)]]

        with ThreadPoolExecutor(len(self.readers)) as pool:
            parts = list(pool.map(read, range(len(self.readers))))
        lines = [parts[i % len(parts)][i // len(parts)] for i in range(len(arrays))]
        return torch.tensor(
            [text_score(prompt, found) for prompt, found in zip(prompts, lines, strict=True)], dtype=torch.float32
        )


def quoted_texts(prompt: str) -> list[str]:
    """Return the texts in quotation marks, folded."""
    return [text for text in (folded(match[1] or match[2]) for match in QUOTED.finditer(prompt)) if text]


def folded(text: str) -> str:
    """Return a text without blanks, case and letters of full width."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_score(prompt: str, lines: list[str]) -> float:
    """Return the score of the lines that were read, 0 to 100."""
    found = [folded(line) for line in lines]
    runs = {"".join(found[start:end]) for start in range(len(found)) for end in range(start + 1, len(found) + 1)}
    whole, texts = "".join(found), quoted_texts(prompt)
    shares = []
    for text in texts:
        near = [run for run in runs if len(run) < 2 * len(text)]  # others are as far as can be
        distance = 0 if text in whole else min((edit_distance(text, run) for run in near), default=len(text))
        shares.append(max(0.0, 1 - distance / len(text)))
    return 100 * sum(shares) / len(shares)


def edit_distance(one: str, two: str) -> int:
    """Return the least number of letters to insert, delete or replace."""
    row = list(range(len(two) + 1))
    for i, letter in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(two, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return row[-1]


def rapidocr_reader() -> Reader:
    """Return a reader with the models in RapidOCR's wheel, on one thread of the CPU. Raises UserError if it is not installed."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError("ocr reads with RapidOCR, which is not installed: pip install -r requirements-ocr.txt.") from error
    settings = {
        "Global.use_cls": False,  # no lines that stand on their head
        "Global.log_level": "critical",
        "Det.limit_side_len": SHORT_SIDE,
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,
    }
    engine = RapidOCR(params=settings)
    return lambda image: list(engine(image[..., ::-1]).txts or ())  # BGR


def tesseract_reader() -> Reader:
    """Return a reader that calls the program tesseract. Raises UserError if it is not installed."""
    program = shutil.which("tesseract")
    if program is None:
        raise UserError(
            "ocr_tesseract calls the program tesseract, which is not installed: apt install tesseract-ocr, or leave it out."
        )

    def read(image: np.ndarray) -> list[str]:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", compress_level=1)
        try:
            done = subprocess.run(
                [program, "stdin", "stdout"], input=file.getvalue(), capture_output=True, timeout=TESSERACT_SECONDS, check=True,
                env=os.environ | {"OMP_THREAD_LIMIT": "1"},
            )  # fmt: skip
        except subprocess.CalledProcessError as error:
            raise UserError(
                f"tesseract has failed ({error.stderr.decode(errors='replace')[:200]}): correct that, then resume."
            ) from error
        return [line for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]

    return read


READERS = {"ocr": ("RapidOCR", rapidocr_reader), "ocr_tesseract": ("Tesseract", tesseract_reader)}
