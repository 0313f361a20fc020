"""Draws images with the stock pipeline, without churn (docs/method.md 5), for generate.py and metrics.py.

Evaluations during training draw with the training graph instead (fdfo/method/evaluate.py): the stock pipeline would need its own
precision, memory and compiled blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fdfo.config.errors import UserError
from fdfo.config.plan import ImagePlan, ImageSettings
from fdfo.model.flow_model import FlowModel
from fdfo.model.text import TextEmbeddings


def quantised(images: torch.Tensor) -> torch.Tensor:
    """Round images in [0, 1] to uint8 on the CPU, as files and evaluations have them; the shape stays."""
    return (255 * images.float()).round().clamp(0, 255).to(torch.uint8).cpu()


def quantised_as_published(images: torch.Tensor) -> torch.Tensor:
    """Return what the published code makes of images in [0, 1]: x 255 + 0.5 in their own type, cut to uint8, on the CPU.

    In bfloat16 the sum is rounded before it is cut, so that many values come out one level higher (docs/method.md 5).
    """
    return (images * 255 + 0.5).clamp(0, 255).to(torch.uint8).cpu()


def finite_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return which rows of [N, ...] are finite throughout: [N] bool."""
    return tensor.isfinite().flatten(1).all(1)


def one_colour(images: torch.Tensor) -> torch.Tensor:
    """Return 1 for every image [N, 3, H, W] in [0, 1] that is of one colour, else 0: [N]."""
    pixels = images.flatten(2)  # [N, 3, H W]
    return ((pixels.amax(2) - pixels.amin(2)) < 1 / 255).all(1).float()


@dataclass(frozen=True)
class ImageText:
    """Encoded prompts on the CPU, and the empty prompt, which guidance needs."""

    prompts: TextEmbeddings
    empty: TextEmbeddings  # one row


def load_for_images(plan: ImagePlan, adapter: Path | None, device: torch.device) -> FlowModel:
    """Load the plan's base model onto the device, with the adapter of a folder if one is given. Raises UserError.

    bfloat16 on a GPU, as published (docs/method.md 5); float32 on a CPU and for models trained in float32.
    """
    model = FlowModel(plan.model, "bf16" if plan.half_precision and device.type == "cuda" else "fp32", device)
    check_sides(model, plan.settings)
    if adapter is not None:
        model.load_adapter(adapter)
    model.to_device()
    return model


def check_sides(model: FlowModel, settings: ImageSettings) -> None:
    """Raise UserError for images that the model cannot draw."""
    for side in (settings.width, settings.height):
        model.latent_shape(side)


def encode_for_images(model: FlowModel, prompts: Sequence[str]) -> ImageText:
    """Encode the prompts as the pipeline itself does, and keep them on the CPU: 2.7 MB per prompt for SD3.5 in bfloat16."""
    prompts, empty = (model.encode(texts, model.family.image_text).to(torch.device("cpu")) for texts in (prompts, [""]))
    return ImageText(prompts, empty)


@torch.no_grad()
def draw_images(
    model: FlowModel, text: ImageText, rows: Sequence[int], seeds: Sequence[int], settings: ImageSettings
) -> Iterator[torch.Tensor]:
    """Draw one image for every row of the text and its seed, batch by batch: [n, 3, H, W] uint8 on the CPU.

    Noise comes from one CPU generator per image, so that an image does not depend on its batch. Raises UserError for images
    that are not finite.
    """
    for i in range(0, len(rows), settings.batch_size):
        batch = text.prompts.rows(list(rows[i : i + settings.batch_size])).to(model.device)
        empty = text.empty.rows([0] * len(batch)).to(model.device)
        images = model.pipe(
            **model.family.drawing(batch, empty, settings),
            width=settings.width,
            height=settings.height,
            num_inference_steps=settings.steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[i : i + settings.batch_size]],
            output_type="pt",
        ).images  # [n, 3, H, W]
        if broken := int((~finite_rows(images)).sum()):
            raise UserError(
                f"{broken} of {len(images)} images are not finite: the adapter is damaged, or was trained until it broke; take an "
                "earlier checkpoint."
            )
        yield quantised(images) if settings.published_processes is None else quantised_as_published(images)
