"""Makes sheets of images with their captions."""

import io
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from fdfo.config.errors import UserError
from fdfo.storage.atomic_files import write_bytes

BETTER = "#2a9d4a"  # frame of a pair's better image
MOST_LINES = 12  # of a caption


def to_pil(image: torch.Tensor, size: int | None = None) -> Image.Image:
    """Convert [3, H, W] uint8 to a PIL image, enlarged without smoothing to a width of `size` if given."""
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    return pil if size is None else pil.resize((size, size * pil.height // pil.width), Image.Resampling.NEAREST)


def caption(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into at most MOST_LINES lines of at most `width` pixels; a JPEG has at most 65,500 rows."""
    columns = max(2, len(text))
    while True:
        lines = textwrap.wrap(text, columns, max_lines=MOST_LINES, placeholder="…")
        if columns == 2 or all(font.getlength(line) <= width for line in lines):
            return lines
        columns = max(2, columns * 9 // 10)


def grid_sheet(prompts: list[str], images: torch.Tensor, columns: int, cols: int, rows: int) -> Image.Image:
    """Draw the prompts down one column after the other, each a block of cols x rows images under its caption.

    images [N cols rows, 3, H, W] uint8, in the order of the prompts.
    """
    height, width = images.shape[-2:]
    scale = -(-96 // width)  # tiny images are enlarged, so that captions can be read
    cell_w, cell_h, gap = width * scale, height * scale, 8
    seam = 2  # between images of one prompt
    font = ImageFont.load_default(max(12, cell_h // 22))
    line = int(font.size * 1.35)
    captions = [caption(prompt, font, cols * (cell_w + seam)) for prompt in prompts]
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
            image = to_pil(images[k * cols * rows + i], cell_w)
            sheet.paste(image, (left + (i % cols) * (cell_w + seam), top + text_height + (i // cols) * (cell_h + seam)))
    return sheet


@dataclass(frozen=True)
class ShownPair:
    """Both images of a training pair, with their rewards."""

    prompt: str
    images: torch.Tensor  # [2, 3, H, W] uint8
    rewards: tuple[float, float]


def pair_sheet(pairs: list[ShownPair], columns: int = 4, size: int = 160) -> Image.Image:
    """Draw pairs with the rewards under their images: the better one of a pair framed, the sheet's best and worst named."""
    font, gap, frame = ImageFont.load_default(13), 10, 4
    line, block_w = 18, 2 * (size + gap) + gap
    captions = [caption(pair.prompt, font, block_w - 2 * gap) for pair in pairs]
    block_h = size + 2 * gap + line * (1 + max(map(len, captions)))
    sheet = Image.new("RGB", (min(columns, len(pairs)) * block_w, -(-len(pairs) // columns) * block_h + gap), "white")
    draw = ImageDraw.Draw(sheet)
    rewards = [reward for pair in pairs for reward in pair.rewards if math.isfinite(reward)]
    best, worst = max(rewards, default=math.nan), min(rewards, default=math.nan)
    for k, (pair, lines) in enumerate(zip(pairs, captions, strict=True)):
        left, top = k % columns * block_w + gap, k // columns * block_h + gap
        for i, (image, reward) in enumerate(zip(pair.images, pair.rewards, strict=True)):
            x = left + i * (size + gap)
            if reward == max(pair.rewards) > min(pair.rewards):
                draw.rectangle((x - frame, top - frame, x + size + frame - 1, top + size + frame - 1), fill=BETTER)
            sheet.paste(to_pil(image, size).crop((0, 0, size, size)), (x, top))
            name = "" if best == worst else " best" if reward == best else " worst" if reward == worst else ""
            draw.text((x, top + size + frame), f"{reward:.4g}{name}", fill="black", font=font)
        for i, text in enumerate(lines):
            draw.text((left, top + size + frame + line * (i + 1)), text, fill="black", font=font)
    return sheet


def encoded(image: Image.Image, suffix: str) -> bytes:
    """Return the content of an image's file: .jpg, .jpeg or .png. Raises OSError for an image too large for its format.

    Pillow does not see that a disk is full while it writes a file of its own.
    """
    content = io.BytesIO()
    image.save(content, format="PNG" if suffix.lower() == ".png" else "JPEG", quality=90)
    return content.getvalue()


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet of a run, whole or not at all. Raises UserError."""
    try:
        path.parent.mkdir(exist_ok=True)
        write_bytes(path, encoded(sheet, path.suffix))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}): make room, then resume.") from error
