"""openai+http://HOST:PORT/v1#MODEL: a judge behind an OpenAI-compatible chat endpoint that takes images (vLLM, SGLang, llama.cpp)."""

import math
import os
from functools import partial

import torch

from fdfo.config.errors import UserError
from rewards.remote.png import to_png
from rewards.remote.server import Limits, Message, Server
from rewards.vlm.judge import QUESTIONS

QUESTION = QUESTIONS["vlm_alignment_train"]
KEY = "OPENAI_API_KEY"
TOP = 20  # tokens whose probability is asked for, the most that the protocol allows
ONE_IMAGE_EACH = Limits(in_flight=8)


class ChatScorer:
    """100 p(Yes) / (p(Yes) + p(No)) of the answer's first token; NaN if neither is among the likeliest tokens.

    The question is that of vlm_alignment in training. Images are rounded to 8 bits. The key comes from the environment.
    """

    def __init__(self, url: str, model: str, limits: Limits = ONE_IMAGE_EACH):
        """url: that of the API, ending in /v1 for most servers. Raises UserError if nothing listens there."""
        self.model_name, self.server = model, Server(f"{url}/chat/completions", limits, read_key())
        self.description = f"{model} at {url}, asked {QUESTION!r}"

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        """Score prompts [N], images [N, 3, H, W] float in [0, 1] or uint8 -> [N] float32 in [0, 100]. Raises UserError."""
        answers = self.server.ask_all([partial(self._message, *row) for row in zip(prompts, images, strict=True)])
        return torch.tensor([self._yes(answer) for answer in answers], dtype=torch.float32)

    def _message(self, prompt: str, image: torch.Tensor) -> Message:
        """The caption is data: a blank breaks up control tokens in it."""
        text = QUESTION.replace("{prompt}", prompt.replace("<|", "< |"))
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{to_png(image)}"}}
        turns = [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": [picture, {"type": "text", "text": text}]},
        ]
        return {
            "model": self.model_name, "messages": turns, "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": TOP,
        }  # fmt: skip

    def _yes(self, answer: object) -> float:
        """Return the score of an answer. Raises UserError unless it has the first token's probabilities."""
        try:
            tokens = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            words = [(token["token"].strip().casefold(), math.exp(token["logprob"])) for token in tokens]
        except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(
                f"The server {self.server.url} answered without the log-probabilities of the first token: choose a server and a "
                "model that give top_logprobs, such as vLLM, SGLang or llama.cpp."
            ) from error
        yes, no = (math.fsum(p for word, p in words if word == answer) for answer in ("yes", "no"))
        return 100 * yes / (yes + no) if yes + no > 0 else math.nan


def read_key() -> str | None:
    """Return the key of the environment, None if there is none. Raises UserError, without the key, if it cannot be sent."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{KEY} has characters that no key has: set it again.")
    return key or None
