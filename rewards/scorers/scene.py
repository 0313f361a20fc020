"""`scene`: the tiny preset's reward. Looks at the pixels, compares what it sees with the caption, gives 0 to 100.

A black box to the training: thresholds, centroids and templates, no gradient. Each fact of the caption counts the same:
the background's colour, every object (there, of that colour, of that shape), and where the objects lie.
"""

import torch

from fdfo.config.errors import UserError
from fdfo.tiny.scenes import COLOURS, IMAGE_SIZE, RELATIONS, SHAPES, Scene, parse_caption, shape_mask

COLOUR_TOLERANCE = 0.30  # a pixel farther than this from its nearest palette colour (L2, RGB in [0, 1]) has no colour
SHAPE_SHARPNESS = 25.0  # how strongly the best overlapping template wins over the others
AREA_RANGE = (100.0, 700.0)  # pixels; true objects cover 150 to 530
MAX_BATCH = 256


class SceneScorer:
    """Score of an image against a caption of the tiny preset's grammar, in [0, 100]; true renderings get about 97."""

    description = "colours, shapes and places of a scene against its caption"

    def __init__(self, device: str | torch.device = "cpu"):
        self.palette = torch.tensor(list(COLOURS.values()), device=device)  # [K, 3]

    def check_prompts(self, prompts: list[str]) -> None:
        """Raise UserError for a prompt outside the grammar."""
        for prompt in prompts:
            parse_caption(prompt)

    @torch.no_grad()
    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        """Score prompts [N], images [N, 3, 64, 64] float in [0, 1] or uint8 -> [N] float32.

        Raises UserError if a prompt is outside the grammar or the images are not 64 x 64.
        """
        if tuple(images.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise UserError(f"The scene scorer needs images of {IMAGE_SIZE} x {IMAGE_SIZE}, got {tuple(images.shape)}.")
        scenes = [parse_caption(prompt) for prompt in prompts]
        scores = [
            self._score_batch(scenes[i : i + MAX_BATCH], images[i : i + MAX_BATCH]) for i in range(0, len(scenes), MAX_BATCH)
        ]
        return torch.cat(scores)

    def _score_batch(self, scenes: list[Scene], images: torch.Tensor) -> torch.Tensor:
        device = self.palette.device
        pixels = images.to(device).float() / (255 if images.dtype == torch.uint8 else 1)
        distance = (pixels[:, None] - self.palette[None, :, :, None, None]).square().sum(2).sqrt()  # [N, K, H, W]
        nearest, label = distance.min(dim=1)  # [N, H, W]
        label = label.masked_fill(nearest > COLOUR_TOLERANCE, len(COLOURS))
        names = list(COLOURS)

        def colour_mask(colours: list[str | None]) -> torch.Tensor:
            wanted = torch.tensor([-1 if c is None else names.index(c) for c in colours], device=device)
            return (label == wanted[:, None, None]).float()  # [N, H, W]

        first = colour_mask([s.objects[0][0] for s in scenes])
        second = colour_mask([s.objects[1][0] if s.relation else None for s in scenes])
        background = colour_mask([s.background for s in scenes])
        paired = torch.tensor([float(s.relation is not None) for s in scenes], device=device)
        object1, centre1 = object_fact(first, [s.objects[0][1] for s in scenes])
        object2, centre2 = object_fact(second, [s.objects[1][1] if s.relation else SHAPES[0] for s in scenes])
        place = relation_fact(centre1, centre2, scenes) * torch.minimum(object1, object2).gt(0.1)
        free = (1 - first) * (1 - second)
        ground = ((background * free).sum((1, 2)) / free.sum((1, 2)).clamp(min=1) / 0.95).clamp(max=1)
        return 100 * (ground + object1 + paired * (object2 + place)) / (2 + 2 * paired)


def object_fact(mask: torch.Tensor, shapes: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how well the pixels of one colour make up the shape: mask [N, H, W] in {0, 1} -> fact [N] in [0, 1], centre [N, 2].

    Every shape is drawn again with the mask's centre of mass and area; the caption's shape must overlap well, and
    better than the other four.
    """
    area = mask.sum((1, 2))  # [N], pixels
    grid = torch.arange(mask.shape[-1], device=mask.device) + 0.5
    centroid = torch.stack([(mask * grid).sum((1, 2)), (mask * grid[:, None]).sum((1, 2))], dim=1)
    centroid = centroid / area.clamp(min=1)[:, None]  # [N, 2], pixels (x, y)
    wanted = torch.tensor([SHAPES.index(shape) for shape in shapes], device=mask.device)
    overlap = template_overlap(mask, area, centroid)  # [N, S]
    right = overlap.gather(1, wanted[:, None])[:, 0]
    preference = (SHAPE_SHARPNESS * overlap).softmax(1).gather(1, wanted[:, None])[:, 0]
    there = (area / AREA_RANGE[0]).clamp(max=1) * (AREA_RANGE[1] / area.clamp(min=1)).clamp(max=1)
    return there * preference * ((right - 0.4) / 0.4).clamp(0, 1), centroid


def template_overlap(mask: torch.Tensor, area: torch.Tensor, centroid: torch.Tensor) -> torch.Tensor:
    """Return the intersection over union of the mask with each shape of the same area and centre of mass: -> [N, S]."""
    unit = torch.tensor([[IMAGE_SIZE / 2, IMAGE_SIZE / 2]], device=mask.device)
    grid = torch.arange(IMAGE_SIZE, device=mask.device) + 0.5
    overlaps = []
    for shape in SHAPES:
        reference = shape_mask(shape, unit, torch.tensor([20.0], device=mask.device))[0]  # [H, W], the shape at radius 20
        below = (reference * grid[:, None]).sum() / reference.sum() - IMAGE_SIZE / 2  # its centre of mass, in pixels
        radius = 20 * (area / reference.sum()).sqrt()  # [N]
        offset = torch.stack([torch.zeros_like(radius), below * radius / 20], dim=1)
        template = shape_mask(shape, centroid - offset, radius.clamp(min=1))  # [N, H, W]
        both = torch.minimum(mask, template).sum((1, 2))
        overlaps.append(both / torch.maximum(mask, template).sum((1, 2)).clamp(min=1))
    return torch.stack(overlaps, dim=1)


def relation_fact(centre1: torch.Tensor, centre2: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
    """Return 1 if object 2 lies clearly on its side of object 1, 0 if it does not: centres [N, 2] -> [N] in [0, 1]."""
    direction = torch.tensor([RELATIONS[s.relation] if s.relation else (0, 0) for s in scenes], device=centre1.device)
    delta = centre2 - centre1  # [N, 2]
    along = (delta * direction).sum(1)
    across = (delta * direction.flip(1)).sum(1).abs()
    return ((along - across) / 8).clamp(0, 1)
