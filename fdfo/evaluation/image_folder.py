"""Images on disk: those that metrics.py saves, and those of any other method that it scores."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fdfo.config.errors import UserError
from fdfo.report.sheets import encoded, to_pil
from fdfo.storage.atomic_files import write_bytes
from fdfo.storage.hub import load_prompt_set

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class PromptImages:
    """The image files of one prompt."""

    text: str
    files: tuple[Path, ...]


def find_images(folder: Path, prompt_set: str, as_published: bool = False) -> list[PromptImages]:
    """Return what a folder holds, prompt by prompt. Each entry, an image or a sub-folder of images, belongs to one prompt.

    If all names are numbers, they are the prompts' numbers in the prompt set, from 0: 000012.png, or
    000012/0.png and 000012/1.png. If none is, a name is the prompt itself: "a red fox.png". Raises UserError otherwise.
    as_published: prompts as load_prompt_set knows them.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: give --images a folder of images.")
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        files = sorted(p for p in entry.iterdir() if is_image(p)) if entry.is_dir() else [entry] * is_image(entry)
        if files:
            found.setdefault(entry.name if entry.is_dir() else entry.stem, []).extend(files)
    if not found:
        raise UserError(
            f"{folder} holds no images: give --images a folder with {', '.join(SUFFIXES)} files or sub-folders of them."
        )
    numbered = [name for name in found if name.isdecimal()]
    if not numbered:
        return [PromptImages(name, tuple(files)) for name, files in found.items()]
    if len(numbered) < len(found):
        other = next(name for name in found if not name.isdecimal())
        raise UserError(f"{folder} mixes numbers ({numbered[0]}) and prompts ({other}) as names: use one of the two.")
    prompts = load_prompt_set(prompt_set, as_published)
    by_number: dict[int, list[Path]] = {}
    for name, files in found.items():
        by_number.setdefault(int(name), []).extend(files)
    if max(by_number) >= len(prompts):
        raise UserError(
            f"{folder} has an image for prompt {max(by_number)}, {prompt_set} ends at {len(prompts) - 1}: check --prompt-set."
        )
    return [PromptImages(prompts[number], tuple(by_number[number])) for number in sorted(by_number)]


def is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def read_image(path: Path) -> torch.Tensor | None:
    """Read an image -> [3, H, W] uint8, or None for a file that is damaged or no image. 16 bits become 8 by their scale."""
    try:
        with Image.open(path) as image:
            if image.mode in ("I", "I;16", "I;16B"):  # Pillow would cut all above 255
                grey = (np.array(image) / 257).round().astype(np.uint8)
                return torch.from_numpy(grey).expand(3, *grey.shape)
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises for damaged files
        return None


def read_images(entries: list[PromptImages]) -> tuple[torch.Tensor, list[int], list[str]]:
    """Read all images -> [N, 3, H, W] uint8, how many each prompt has, and the names of broken files, which are left out.

    Raises UserError for images of different sizes.
    """
    images, counts, broken, first = [], [], [], None
    for entry in entries:
        counts.append(0)
        for path in entry.files:
            image = read_image(path)
            if image is None:
                broken.append(str(path))
                continue
            first = first or path
            if images and image.shape != images[0].shape:
                raise UserError(f"{path} and {first} differ in size: score images of different sizes in separate folders.")
            images.append(image)
            counts[-1] += 1
    return torch.stack(images) if images else torch.empty(0, 3, 0, 0, dtype=torch.uint8), counts, broken


def check_new_folder(folder: Path) -> None:
    """Raise UserError unless images can be saved there without mixing with others."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: give --save-images a new folder, so that no images are mixed.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): give --save-images another folder.") from error


def save_image(folder: Path, number: int, repeat: int, image: torch.Tensor) -> None:
    """Save [3, H, W] uint8 as folder/000012/0.png for prompt 12 of its set, as find_images reads it. Raises UserError."""
    path = folder / f"{number:06d}" / f"{repeat}.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, encoded(to_pil(image), path.suffix))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): make room or give another --save-images.") from error
