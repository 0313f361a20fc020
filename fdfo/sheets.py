"""Sheets of pictures with their captions."""

import torch
from PIL import Image, ImageDraw, ImageFont


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
