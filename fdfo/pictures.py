"""Drawing evaluation pictures with the stock pipeline, without churn (METHOD.md 5)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fdfo.config import UserError
from fdfo.model import FlowModel, finite_rows, quantised
from fdfo.plan import PicturePlan, PictureSettings
from fdfo.text import PICTURE_TEXT_LENGTH, TextEmbeddings


@dataclass(frozen=True)
class PictureText:
    """Encoded prompts on the CPU, and the empty prompt, which guidance needs."""

    prompts: TextEmbeddings
    empty: TextEmbeddings  # one row


def load_for_pictures(plan: PicturePlan, adapter: Path | None, device: torch.device) -> FlowModel:
    """The plan's base model on the device, with the adapter of a folder where there is one. Raises UserError."""
    model = FlowModel(plan.model, picture_precision(plan, device), device)
    check_settings(model, plan.pictures)
    if adapter is not None:
        model.load_adapter(adapter)
    model.to_device()
    return model


def picture_precision(plan: PicturePlan, device: torch.device) -> str:
    """bfloat16 on a GPU, as published (METHOD.md 5); float32 on a CPU and for models trained in float32."""
    return "bf16" if plan.half_precision and device.type == "cuda" else "fp32"


def check_settings(model: FlowModel, settings: PictureSettings) -> None:
    """Raises UserError for pictures the model cannot draw."""
    for side in (settings.width, settings.height):
        model.latent_shape(side)
    if settings.steps < 1 or settings.batch_size < 1 or not 1 <= settings.guidance < math.inf:
        raise UserError("Steps, batch size and guidance must be 1 or more: change the flag that is not.")


def encode_for_pictures(model: FlowModel, prompts: Sequence[str]) -> PictureText:
    """The prompts as the pipeline itself encodes them, kept on the CPU: 2.7 MB a prompt for SD3.5 in bfloat16."""
    prompts, empty = (model.encode(texts, PICTURE_TEXT_LENGTH).to(torch.device("cpu")) for texts in (prompts, [""]))
    return PictureText(prompts, empty)


@torch.no_grad()
def draw_pictures(
    model: FlowModel, text: PictureText, rows: Sequence[int], seeds: Sequence[int], settings: PictureSettings
) -> Iterator[torch.Tensor]:
    """One picture for every row of the text and its seed, batch by batch: [n, 3, H, W] uint8 on the CPU.

    Noise comes from one CPU generator a picture, so that a picture does not depend on its batch. Raises UserError for pictures
    that are not finite.
    """
    for i in range(0, len(rows), settings.batch_size):
        batch = text.prompts.rows(list(rows[i : i + settings.batch_size])).to(model.device)
        empty = text.empty.rows([0] * len(batch.tokens)).to(model.device)
        images = model.pipe(
            prompt_embeds=batch.tokens,
            pooled_prompt_embeds=batch.pooled,
            negative_prompt_embeds=empty.tokens,
            negative_pooled_prompt_embeds=empty.pooled,
            width=settings.width,
            height=settings.height,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[i : i + settings.batch_size]],
            output_type="pt",
        ).images
        if broken := int((~finite_rows(images)).sum()):
            raise UserError(
                f"{broken} of {len(images)} pictures are not finite: the adapter is damaged, or was trained until it broke; take an "
                "earlier checkpoint."
            )
        yield quantised(images)
