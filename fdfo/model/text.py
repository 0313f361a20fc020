"""Encodes prompts to the text embeddings that the transformer takes (docs/method.md 4 and 5)."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusion3Pipeline

TRAINING_TEXT_LENGTH = 128  # T5 tokens in training
IMAGE_TEXT_LENGTH = 256  # T5 tokens for the images of generate.py and metrics.py
TEXT_BATCH = 16  # prompts


class Once(logging.Filter):
    """Show the pipeline's warning about long prompts once, without the prompts, instead of for each prompt in every epoch."""

    told = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "truncated" not in record.getMessage():
            return True
        record.msg, record.args = "Some prompts are longer than a text encoder reads; they are truncated.", ()
        first, self.told = not self.told, True
        return first


logging.getLogger("diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3").addFilter(Once())


@dataclass(frozen=True)
class TextEmbeddings:
    """Encoded prompts, one a row."""

    tokens: torch.Tensor  # [N, L, D], CLIP's tokens, then T5's
    pooled: torch.Tensor  # [N, D']

    def rows(self, index: torch.Tensor | slice | list[int]) -> "TextEmbeddings":
        return TextEmbeddings(self.tokens[index], self.pooled[index])

    def to(self, device: torch.device) -> "TextEmbeddings":
        return TextEmbeddings(self.tokens.to(device), self.pooled.to(device))


def text_length(pipe: StableDiffusion3Pipeline, wanted: int) -> int:
    """Return the number of T5 tokens: as wanted, but never more than the model was trained for (docs/method.md 4 and 5)."""
    return min(wanted, pipe.tokenizer_3.model_max_length)


@torch.no_grad()
def encode_text(pipe: StableDiffusion3Pipeline, prompts: Sequence[str], length: int, device: torch.device) -> TextEmbeddings:
    """Encode prompts -> tokens [N, L, D] and pooled [N, D'].

    A GPU's kernels round differently for other numbers of rows. So on a GPU a batch is filled up with the empty prompt, and a
    prompt's embedding does not depend on how many others this process has.
    """
    tokens, pooled = [], []
    for i in range(0, len(prompts), TEXT_BATCH):
        batch = list(prompts[i : i + TEXT_BATCH])
        filler = [""] * (TEXT_BATCH - len(batch)) if device.type == "cuda" else []
        encoded, _, summary, _ = pipe.encode_prompt(
            prompt=batch + filler,
            prompt_2=None,
            prompt_3=None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=text_length(pipe, length),
        )
        tokens.append(encoded[: len(batch)])
        pooled.append(summary[: len(batch)])
    return TextEmbeddings(torch.cat(tokens), torch.cat(pooled))
