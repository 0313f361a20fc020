"""Images on disk, as the page shows them and the export packs them."""

import io
from pathlib import Path

import torch
from PIL import Image

from fdfo.config.errors import UserError
from fdfo.storage.atomic_files import write_bytes


def write_image(path: Path, image: torch.Tensor) -> None:
    """Write an image [3, H, W] uint8 as a JPEG of full colour resolution. Raises UserError."""
    content = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(content, format="JPEG", quality=95, subsampling=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.getvalue())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): make room, then resume.") from error
