"""Pictures for evaluation, by the stock pipeline without churn (METHOD.md 5), and base against adapter on held-out prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from fdfo.checkpoint import Checkpoint
from fdfo.config import TrainConfig, UserError
from fdfo.distributed import Job
from fdfo.model import PICTURE_TEXT_LENGTH, FlowModel
from fdfo.plan import PicturePlan, PictureSettings
from fdfo.prompts import load_prompts
from fdfo.rollout import gather_scores
from rewards import Scorer

HELDOUT_SEED = 100_000


@torch.no_grad()
def draw_pictures(model: FlowModel, prompts: Sequence[str], seeds: Sequence[int], settings: PictureSettings) -> torch.Tensor:
    """One picture a prompt and seed, quantised: [N, 3, H, W] uint8 on the CPU. Noise comes from one CPU generator a picture."""
    pictures = []
    for i in range(0, len(prompts), settings.batch_size):
        images = model.pipe(
            prompt=list(prompts[i : i + settings.batch_size]),
            width=settings.width,
            height=settings.height,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[i : i + settings.batch_size]],
            max_sequence_length=model.text_length(PICTURE_TEXT_LENGTH),
            output_type="pt",
        ).images
        pictures.append((255 * images.float()).round().clamp(0, 255).to(torch.uint8).cpu())
    return torch.cat(pictures)


@dataclass(frozen=True)
class Comparison:
    """Scores of the same prompts and seeds before and after: means, and the standard error of the paired difference."""

    metric: str
    before: float
    after: float
    error: float
    count: int

    def describe(self) -> str:
        return (
            f"held-out {self.metric} score {self.before:.1f} -> {self.after:.1f} "
            f"({self.after - self.before:+.1f} +- {self.error:.1f}, {self.count} captions)"
        )


def compare(metric: str, before: list[float], after: list[float]) -> Comparison:
    difference = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    error = float(difference.std() / math.sqrt(len(difference))) if len(difference) > 1 else math.nan
    return Comparison(metric, sum(before) / len(before), sum(after) / len(after), error, len(before))


def compare_with_base(
    job: Job, model: FlowModel, config: TrainConfig, scorers: dict[str, Scorer], folder: Path
) -> list[Comparison]:
    """Base model against adapter on the held-out prompts, shared among ranks; draws before_after.png into the run folder."""
    prompts = load_prompts(config.heldout_prompt_set)[: config.heldout_prompts]
    own = job.share(len(prompts))
    settings = PictureSettings(
        config.sample.resolution,
        config.sample.resolution,
        config.sample.num_solver_steps,
        config.sample.guidance_scale,
        32 if config.preset == "tiny" else 4,
    )
    mine, seeds = [prompts[i] for i in own], [HELDOUT_SEED + i for i in own]
    model.to_device()
    with model.base():
        before = draw_pictures(model, mine, seeds, settings)
    after = draw_pictures(model, mine, seeds, settings)
    both = [
        gather_scores(job, {metric: scorer.score(mine, images) for metric, scorer in scorers.items()})
        for images in (before, after)
    ]
    if job.is_main:
        before_after_sheet(mine[:6], before[:6], after[:6]).save(folder / "before_after.png")
    return [compare(metric, both[0][metric], both[1][metric]) for metric in scorers]


def to_image(picture: torch.Tensor, size: int | None = None) -> Image.Image:
    """[3, H, W] uint8 -> PIL image, enlarged without smoothing to a width where asked for."""
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    return image if size is None else image.resize((size, size * image.height // image.width), Image.Resampling.NEAREST)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most that many pixels, broken at words, and inside a word that is longer than a line."""
    lines, line = [], ""
    for word in text.split():
        while font.getlength(word) > width:
            cut = next((i for i in range(len(word) - 1, 0, -1) if font.getlength(word[:i]) <= width), 1)
            lines += [line] if line else []
            lines.append(word[:cut])
            word, line = word[cut:], ""
        longer = f"{line} {word}".strip()
        if font.getlength(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line] if line else lines


def picture_precision(plan: PicturePlan, device: torch.device) -> str:
    """bfloat16 on a GPU, as published (METHOD.md 5); float32 on a CPU and for models trained in float32."""
    return "bf16" if plan.half_precision and device.type == "cuda" else "fp32"


def load_for_pictures(plan: PicturePlan, checkpoint: Checkpoint | None, device: torch.device) -> FlowModel:
    """The plan's base model on the device, with the checkpoint's adapter where there is one. Raises UserError."""
    model = FlowModel(plan.model, picture_precision(plan, device), device)
    check_settings(model, plan.pictures)
    if checkpoint is not None:
        model.load_adapter(checkpoint.folder)
    model.to_device()
    return model


def check_settings(model: FlowModel, settings: PictureSettings) -> None:
    """Raises UserError for pictures the model cannot draw."""
    for side in (settings.width, settings.height):
        model.latent_shape(side)
    if settings.steps < 1 or settings.batch_size < 1 or not 1 <= settings.guidance < math.inf:
        raise UserError("Steps, batch size and guidance must be 1 or more: change the flag that is not.")


def grid_sheet(prompts: list[str], pictures: torch.Tensor, columns: int, cols: int, rows: int) -> Image.Image:
    """Prompts down one column after the other, each a block of cols x rows pictures under its caption.

    pictures [N cols rows, 3, H, W] uint8, in the order of the prompts.
    """
    height, width = pictures.shape[-2:]
    scale = -(-96 // width)  # tiny pictures are enlarged, so that captions can be read
    cell_w, cell_h, gap = width * scale, height * scale, 8
    seam = 2  # between pictures of one prompt
    font = ImageFont.load_default(max(12, cell_h // 22))
    line = int(font.size * 1.35)
    captions = [wrap(prompt, font, cols * (cell_w + seam)) for prompt in prompts]
    text_height = line * max(map(len, captions)) + gap
    block_w, block_h = cols * (cell_w + seam) + gap, rows * (cell_h + seam) + text_height + gap
    down = -(-len(prompts) // columns)  # prompts a column
    sheet = Image.new("RGB", (-(-len(prompts) // down) * block_w + gap, down * block_h + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for k, lines in enumerate(captions):
        left, top = gap + (k // down) * block_w, gap + (k % down) * block_h
        for i, text in enumerate(lines):
            draw.text((left, top + i * line), text, fill="black", font=font)
        for i in range(cols * rows):
            picture = to_image(pictures[k * cols * rows + i], cell_w)
            sheet.paste(picture, (left + (i % cols) * (cell_w + seam), top + text_height + (i // cols) * (cell_h + seam)))
    return sheet


def before_after_sheet(prompts: list[str], before: torch.Tensor, after: torch.Tensor, size: int = 160) -> Image.Image:
    """Two rows of pictures, base above adapter, with the captions below: before, after [N, 3, H, W] uint8."""
    font, label, gap = ImageFont.load_default(13), 56, 6
    captions = [wrap(prompt, font, size) for prompt in prompts]
    height = 2 * (size + gap) + 18 * max(map(len, captions)) + gap
    sheet = Image.new("RGB", (label + len(prompts) * (size + gap), height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, pictures) in enumerate((("before", before), ("after", after))):
        top = gap + row * (size + gap)
        draw.text((6, top + size // 2 - 8), name, fill="black", font=font)
        for i, picture in enumerate(pictures):
            sheet.paste(to_image(picture, size).crop((0, 0, size, size)), (label + i * (size + gap), top))
    for i, lines in enumerate(captions):
        for k, line in enumerate(lines):
            draw.text((label + i * (size + gap), 2 * (size + gap) + 4 + 18 * k), line, fill="black", font=font)
    return sheet
