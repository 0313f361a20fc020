"""Images as PNG in base64, as they go to servers and come from them."""

import base64
import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from fdfo.model.images import quantised

SIGNATURE, UP = b"\x89PNG\r\n\x1a\n", 2  # UP: each row holds its difference from the row above


def to_png(image: torch.Tensor) -> str:
    """Encode an image [3, H, W], float in [0, 1] (rounded to 8 bits) or uint8.

    Written here because Pillow tries five filters for each row, which takes five times as long (benchmarks/http_scorer.py).
    """
    pixels = image if image.dtype == torch.uint8 else quantised(image)
    rows = pixels.permute(1, 2, 0).flatten(1).cpu().numpy()  # [H, 3 W]
    filtered = np.full((rows.shape[0], 1 + rows.shape[1]), UP, np.uint8)
    filtered[:, 1:] = np.diff(rows, axis=0, prepend=np.uint8(0))
    deflate = zlib.compressobj(1, strategy=zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", rows.shape[1] // 3, rows.shape[0], 8, 2, 0, 0, 0)  # 8 bits, RGB
    data = deflate.compress(filtered.tobytes()) + deflate.flush()
    return base64.b64encode(SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")).decode()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a part of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def from_png(text: str) -> torch.Tensor:
    """Decode an image -> [3, H, W] uint8. Raises ValueError for anything else."""
    try:
        content = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, TypeError) as error:
        raise ValueError(f"no PNG in base64 ({error})") from error
