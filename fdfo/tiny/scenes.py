"""The world of the tiny preset: captions of small scenes, and images of them.

A scene is a background colour and one or two objects; a caption says which ("a white circle left of a blue triangle on
a cyan background"). Colours of one scene always differ. An eighth of all captions, chosen by a hash of the text, is
held out: no model of the tiny preset is ever trained on them.
"""

import hashlib
import itertools
import random
import re
from dataclasses import dataclass

import torch

from fdfo.config.errors import UserError

IMAGE_SIZE = 64
COLOURS = {
    "red": (0.86, 0.20, 0.18),
    "green": (0.22, 0.62, 0.28),
    "blue": (0.18, 0.34, 0.80),
    "yellow": (0.95, 0.80, 0.20),
    "cyan": (0.35, 0.80, 0.86),
    "purple": (0.52, 0.22, 0.62),
    "white": (0.96, 0.96, 0.96),
    "black": (0.08, 0.08, 0.10),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
RELATIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}  # where object 2 lies, (x, y)

_OBJECT = rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{_OBJECT}(?: ({'|'.join(RELATIONS)}) {_OBJECT})? on an? ({'|'.join(COLOURS)}) background")


@dataclass(frozen=True)
class Scene:
    """What a caption says: background colour, objects as (colour, shape), and how object 1 lies to object 2."""

    background: str
    objects: tuple[tuple[str, str], ...]
    relation: str | None = None

    def caption(self) -> str:
        objects = [f"a {colour} {shape}" for colour, shape in self.objects]
        return f"{f' {self.relation} '.join(objects)} on a {self.background} background"


def parse_caption(caption: str) -> Scene:
    """Return the scene that a caption describes. Raises UserError for text outside the tiny preset's grammar."""
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        raise UserError(
            f"The tiny preset does not understand the caption {caption[:200]!r}: write 'a COLOUR SHAPE on a COLOUR background' or "
            f"'a COLOUR SHAPE RELATION a COLOUR SHAPE on a COLOUR background' with colours {', '.join(COLOURS)}, shapes "
            f"{', '.join(SHAPES)}, relations {', '.join(RELATIONS)}."
        )
    colour1, shape1, relation, colour2, shape2, background = match.groups()
    second = () if relation is None else ((colour2, shape2),)
    return Scene(background, ((colour1, shape1), *second), relation)


def all_scenes() -> list[Scene]:
    """Return every scene of the world: 280 with one object, 33,600 with two."""
    scenes = []
    for background, colour1 in itertools.permutations(COLOURS, 2):
        for shape1 in SHAPES:
            scenes.append(Scene(background, ((colour1, shape1),)))
            others = [colour for colour in COLOURS if colour not in (background, colour1)]
            for relation, colour2, shape2 in itertools.product(RELATIONS, others, SHAPES):
                scenes.append(Scene(background, ((colour1, shape1), (colour2, shape2)), relation))
    return scenes


def is_held_out(caption: str) -> bool:
    """Return True for the eighth of all captions that training never sees."""
    return hashlib.sha256(caption.encode()).digest()[0] % 8 == 0


def tiny_prompt_sets(seed: int = 0) -> tuple[list[str], list[str]]:
    """Return the tiny preset's training and held-out captions (prompt_sets/tiny.txt and tiny_heldout.txt)."""
    rng = random.Random(seed)
    scenes = all_scenes()
    rng.shuffle(scenes)

    def pick(held_out: bool, singles: int, total: int) -> list[str]:
        candidates = [scene for scene in scenes if is_held_out(scene.caption()) == held_out]
        one = [scene.caption() for scene in candidates if scene.relation is None][:singles]
        two = [scene.caption() for scene in candidates if scene.relation is not None][: total - len(one)]
        captions = one + two
        rng.shuffle(captions)
        return captions

    return pick(False, 240, 4096), pick(True, 32, 512)


def shape_mask(shape: str, centre: torch.Tensor, radius: torch.Tensor, size: int = IMAGE_SIZE) -> torch.Tensor:
    """Return the anti-aliased coverage in [0, 1] of every pixel by one shape: centre [N, 2] (x, y), radius [N], pixels -> [N, H, W]."""
    grid = torch.arange(size, dtype=torch.float32, device=centre.device) + 0.5
    x = grid[None, None, :] - centre[:, 0, None, None]  # [N, 1, W]
    y = grid[None, :, None] - centre[:, 1, None, None]  # [N, H, 1]
    inside = _INSIDE[shape](x, y, radius[:, None, None])  # [N, H, W], pixels to the edge, positive inside
    return (inside + 0.5).clamp(0, 1)


def _box(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x.abs(), y.abs())


def _round(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x.square() + y.square()).sqrt()


_INSIDE = {
    "circle": lambda x, y, r: r - _round(x, y),
    "square": lambda x, y, r: 0.88 * r - _box(x, y),
    "triangle": lambda x, y, r: torch.minimum(0.6 * r - y, 0.45 * y - x.abs() + 0.5 * r),
    "cross": lambda x, y, r: torch.minimum(0.32 * r - torch.minimum(x.abs(), y.abs()), r - _box(x, y)),
    "ring": lambda x, y, r: 0.28 * r - (_round(x, y) - 0.8 * r).abs(),
}


def render(scenes: list[Scene], generator: torch.Generator, device: str | torch.device = "cpu") -> torch.Tensor:
    """Render one image of each scene, with positions and sizes drawn from the generator (on the CPU).

    Returns [N, 3, 64, 64] float32 in [0, 1].
    """
    n = len(scenes)
    uniform = torch.rand(n, 2, 3, generator=generator)  # along, across, radius of each object
    palette = {name: torch.tensor(rgb) for name, rgb in COLOURS.items()}
    image = torch.stack([palette[scene.background] for scene in scenes]).to(device)[:, :, None, None]
    image = image.repeat(1, 1, IMAGE_SIZE, IMAGE_SIZE)  # [N, 3, H, W]
    for k in range(2):
        direction = torch.tensor([_direction(scene, k) for scene in scenes], dtype=torch.float32)  # [N, 2] (x, y)
        paired = direction.abs().sum(1, keepdim=True)
        along = 15 + 3 * (2 * uniform[:, k, 0:1] - 1)
        jitter = (2 * uniform[:, k, :2].flip(1) - 1) * (8 * paired * (1 - direction.abs()) + 14 * (1 - paired))
        centre = IMAGE_SIZE / 2 + direction * along + jitter  # [N, 2]
        radius = 9 + 4 * uniform[:, k, 2]
        shapes = [scene.objects[k][1] if len(scene.objects) > k else None for scene in scenes]
        mask = torch.zeros(n, IMAGE_SIZE, IMAGE_SIZE, device=device)
        for shape in SHAPES:
            rows = torch.tensor([i for i in range(n) if shapes[i] == shape], dtype=torch.long)
            mask[rows.to(device)] = shape_mask(shape, centre[rows].to(device), radius[rows].to(device))
        colour = torch.stack([palette[s.objects[k][0]] if len(s.objects) > k else torch.zeros(3) for s in scenes]).to(device)
        image = image + mask[:, None] * (colour[:, :, None, None] - image)
    return image


def _direction(scene: Scene, k: int) -> tuple[int, int]:
    """Return where object k lies from the middle of the image, as a unit step (x, y); (0, 0) for a single object."""
    if scene.relation is None:
        return (0, 0)
    x, y = RELATIONS[scene.relation]
    return (x, y) if k == 1 else (-x, -y)
