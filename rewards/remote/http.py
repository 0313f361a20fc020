"""http://HOST:PORT/PATH: a server that gives numbers for prompts and images, such as rewards/serve.py."""

from functools import partial

import torch

from fdfo.config.errors import UserError
from rewards.remote.png import to_png
from rewards.remote.server import USUAL, Limits, Message, Server

MAX_BATCH = 8  # images of a question


class HttpScorer:
    """The numbers of a server, asked with POST of {"prompts": [...], "images": [PNG in base64, ...]} for {"scores": [...]}.

    Images are rounded to 8 bits. null and NaN stand for an image without a score.
    """

    def __init__(self, url: str, limits: Limits = USUAL):
        """Raises UserError if nothing listens at the URL."""
        self.server, self.description = Server(url, limits), f"the server {url}, images as PNG"

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        """Score prompts [N], images [N, 3, H, W] float in [0, 1] or uint8 -> [N] float32. Raises UserError."""
        batches = [slice(i, i + MAX_BATCH) for i in range(0, len(prompts), MAX_BATCH)]
        answers = self.server.ask_all([partial(question, prompts[batch], images[batch]) for batch in batches])
        scores = [self._numbers(answer, prompts[batch]) for answer, batch in zip(answers, batches, strict=True)]
        return torch.cat(scores)

    def _numbers(self, answer: object, prompts: list[str]) -> torch.Tensor:
        """Return the numbers of an answer: [N] float32. Raises UserError for another answer."""
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or not all(score is None or type(score) in (int, float) for score in scores):
            raise UserError(
                f"The server {self.server.url} answered {str(answer)[:100]}: it must answer "
                '{"scores": [a number or null for each image]}.'
            )
        if len(scores) != len(prompts):
            raise UserError(
                f"The server {self.server.url} returned {len(scores)} numbers for {len(prompts)} images: it must return one for each."
            )
        return torch.tensor([float("nan") if score is None else to_float(score) for score in scores], dtype=torch.float32)


def question(prompts: list[str], images: torch.Tensor) -> Message:
    return {"prompts": prompts, "images": [to_png(image) for image in images]}


def to_float(number: int | float) -> float:
    """Return a number of JSON, infinite if it is an integer that no float can hold."""
    try:
        return float(number)
    except OverflowError:
        return float("inf")
