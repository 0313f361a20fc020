"""Sheets of pictures with their captions."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from fdfo.config import UserError
from fdfo.manifest import whole_file

BETTER = "#2a9d4a"  # frame of a pair's better picture
MOST_LINES = 12  # of a caption


def to_image(picture: torch.Tensor, size: int | None = None) -> Image.Image:
    """[3, H, W] uint8 -> PIL image, enlarged without smoothing to a width where asked for."""
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    return image if size is None else image.resize((size, size * image.height // image.width), Image.Resampling.NEAREST)


def caption(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text's first MOST_LINES lines, with an ellipsis where there are more: a JPEG has at most 65,500 rows."""
    lines = list(itertools.islice(wrap(text, font, width), MOST_LINES + 1))
    if len(lines) <= MOST_LINES:
        return lines
    last = lines[MOST_LINES - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*lines[: MOST_LINES - 1], f"{last}…"]


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    """Lines of at most that many pixels, broken at words, and inside a word that is longer than a line."""
    line = ""
    for word in text.split():
        while (cut := fitting(word, font, width)) < len(word):
            if line:
                yield line
            yield word[:cut]
            word, line = word[cut:], ""
        longer = f"{line} {word}".strip()
        if font.getlength(longer) > width:
            yield line
            line = word
        else:
            line = longer
    if line:
        yield line


def fitting(word: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    """How many of a word's first characters fit into that many pixels; 1 at least."""
    count = 1
    while count < len(word) and font.getlength(word[: count + 1]) <= width:
        count += 1
    return count


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
            picture = to_image(pictures[k * cols * rows + i], cell_w)
            sheet.paste(picture, (left + (i % cols) * (cell_w + seam), top + text_height + (i // cols) * (cell_h + seam)))
    return sheet


@dataclass(frozen=True)
class ShownPair:
    """Both pictures of a training pair, with their rewards."""

    prompt: str
    pictures: torch.Tensor  # [2, 3, H, W] uint8
    rewards: tuple[float, float]


def pair_sheet(pairs: list[ShownPair], columns: int = 4, size: int = 160) -> Image.Image:
    """Pairs with the two rewards under their pictures: the better one of a pair framed, the sheet's best and worst named."""
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
        for i, (picture, reward) in enumerate(zip(pair.pictures, pair.rewards, strict=True)):
            x = left + i * (size + gap)
            if reward == max(pair.rewards) > min(pair.rewards):
                draw.rectangle((x - frame, top - frame, x + size + frame - 1, top + size + frame - 1), fill=BETTER)
            sheet.paste(to_image(picture, size).crop((0, 0, size, size)), (x, top))
            name = "" if best == worst else " best" if reward == best else " worst" if reward == worst else ""
            draw.text((x, top + size + frame), f"{reward:.4g}{name}", fill="black", font=font)
        for i, text in enumerate(lines):
            draw.text((left, top + size + frame + line * (i + 1)), text, fill="black", font=font)
    return sheet


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Writes a sheet of a run, whole or not at all. Raises UserError."""
    try:
        path.parent.mkdir(exist_ok=True)
        with whole_file(path) as partial:
            sheet.save(partial, format="JPEG", quality=90)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}): make room, then resume.") from error
