"""How often Qwen2.5-VL finds the better of two images: asked about both at once (`vlm_pair`), and about each alone (`vlm_alignment`).

python benchmarks/pair_judging.py --vlm-model-name qwenvl-7b --pairs 200

Each pair is a true rendering of a caption of the tiny preset and one of the same scene with one wrong attribute: a colour, a shape or
the place. The better image comes first in half of the pairs. A judge that guesses is right in 50 % of them.
"""

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from fdfo.distributed.launch import run_command_line, start_job  # noqa: E402
from fdfo.storage.prompts import load_prompts  # noqa: E402
from fdfo.tiny.scenes import COLOURS, RELATIONS, SHAPES, Scene, parse_caption, render  # noqa: E402
from rewards.registry import VlmSettings, build_scorers  # noqa: E402

SIZE = 512  # side to which the renderings are enlarged, pixels


@dataclass(frozen=True)
class PairJudgingConfig:
    """Compare two ways to ask the judge."""

    vlm_model_name: str = "qwenvl-7b"
    """judge: qwenvl-7b, qwenvl-3b, a hub id or a folder"""
    pairs: int = 200
    """pairs to judge"""
    seed: int = 0
    """seed of the wrong attributes and of the places of the objects"""


def with_wrong_attribute(scene: Scene, rng: random.Random) -> Scene:
    """Return the scene with another colour or shape of its first object, or, if it has two, the opposite place."""
    (colour, shape), *others = scene.objects
    used = {scene.background, *(other for other, _ in scene.objects)}
    kind = rng.choice(("colour", "shape") + (("place",) if others else ()))
    if kind == "place":
        x, y = RELATIONS[scene.relation]
        return replace(scene, relation=next(name for name, place in RELATIONS.items() if place == (-x, -y)))
    if kind == "colour":
        colour = rng.choice([name for name in COLOURS if name not in used])
    else:
        shape = rng.choice([name for name in SHAPES if name != shape])
    return replace(scene, objects=((colour, shape), *others))


def accuracy(values: torch.Tensor, better_first: torch.Tensor) -> float:
    """Return the share of pairs whose better image has the larger value; a tie counts half. values [P]: R1 - R2."""
    right = torch.where(better_first, values > 0, values < 0).float()
    return float(torch.where(values == 0, 0.5, right).mean())


def main(config: PairJudgingConfig) -> None:
    rng, generator = random.Random(config.seed), torch.Generator().manual_seed(config.seed)
    captions = load_prompts("tiny_heldout")[: config.pairs]
    scenes = [parse_caption(caption) for caption in captions]
    wrong = [with_wrong_attribute(scene, rng) for scene in scenes]
    true, false = (F.interpolate(render(kind, generator), (SIZE, SIZE), mode="nearest") for kind in (scenes, wrong))
    better_first = torch.arange(len(captions)) % 2 == 0
    place = better_first[:, None, None, None]
    first, second = torch.where(place, true, false), torch.where(place, false, true)  # [P, 3, SIZE, SIZE]
    with start_job() as job:
        scorers = build_scorers(["vlm_pair", "vlm_alignment_train"], job, VlmSettings(config.vlm_model_name))
        alone = scorers["vlm_alignment_train"]
        values = {
            "both images at once (vlm_pair)": scorers["vlm_pair"].compare(captions, first, second),
            "each image alone (vlm_alignment_train)": alone.score(captions, first) - alone.score(captions, second),
        }
    error = 0.5 / len(captions) ** 0.5
    for name, value in values.items():
        print(
            f"{name}: right in {100 * accuracy(value.cpu(), better_first):.1f} % of {len(captions)} pairs, +- {100 * error:.1f}"
        )


if __name__ == "__main__":
    run_command_line(lambda: main(tyro.cli(PairJudgingConfig)))
