"""What the VLM judge and PickScore cost an image, and what would make them cheaper: less filling, compiled blocks, other precisions.

python benchmarks/random_hub.py --parts clip vlm --out /dev/shm/random_hub
export HF_HOME=/dev/shm/random_hub HF_HUB_OFFLINE=1
python benchmarks/judge_speed.py --out judge_speed.json

Images come in pairs of one caption that differ by a few grey levels, as the two of a trajectory pair do. Of every variant: ms an image;
how far margins or scores (R), and their differences in a pair (dR), are from those of the code as it is, relative to their
spread; for the judge, whether a margin is equal to the bit in other company. A variant that fails says why, and the rest goes on.
"""

import contextlib
import json
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from clip_precisions import ways  # noqa: E402

import rewards.vlm.judge as judge  # noqa: E402
from fdfo.config.options import to_dict  # noqa: E402
from fdfo.distributed.job import Job  # noqa: E402
from fdfo.distributed.machine import versions  # noqa: E402
from fdfo.model.acceleration import compile_blocks, uncompile_blocks  # noqa: E402
from fdfo.storage.prompts import load_prompts  # noqa: E402
from rewards.scorers.clip import CLIP_MODELS, ClipScorer  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NOISE = 3  # grey levels between the two images of a pair


@dataclass(frozen=True)
class JudgeSpeedConfig:
    """Time variants of the judge and of PickScore."""

    parts: tuple[Literal["judge", "pickscore"], ...] = ("judge", "pickscore")
    """what to time"""
    vlm_model_name: str = "qwenvl-7b"
    """judge: qwenvl-7b, qwenvl-3b, a hub id or a folder"""
    clip: Literal["pickscore", "hpsv2", "clip_h14", "clip_l14", "scene_clip"] = "pickscore"
    """scorer of the CLIP family; scene_clip is small"""
    images: int = 108
    """images, two of each caption"""
    size: int = 512
    """width and height of the images"""
    repeats: int = 3
    """timed runs of a variant, 2 or more; the last has the images in another order"""
    seed: int = 0
    """seed of captions and images"""
    out: Path | None = None
    """JSON file"""


@dataclass(frozen=True)
class Variant:
    """A way to run the judge."""

    step: int = 256
    """length to a multiple of which rows are filled up, tokens; a batch has rows of one such length"""
    rows: int = 16
    """rows to which a batch is filled up"""
    compiled: tuple[Literal["vision", "language"], ...] = ()


FILLINGS = {
    "as it is: multiples of 256, 16 rows": Variant(),
    "multiples of 128": Variant(128),
    "multiples of 64": Variant(64),
    "multiples of 32": Variant(32),
    "multiples of 64, 8 rows": Variant(64, 8),
    "multiples of 32, 8 rows": Variant(32, 8),
    "multiples of 448": Variant(448),
    "multiples of 256, 32 rows": Variant(rows=32),
}
COMPILED = {
    "vision blocks compiled": Variant(compiled=("vision",)),
    "language layers compiled, no cache": Variant(compiled=("language",)),
}


def draw_captions(count: int, rng: random.Random) -> list[str]:
    """Return captions: a third from the tiny preset, the rest of 5 to 60 made-up words, mostly short."""
    words = sorted({word for caption in load_prompts("ocr") for word in re.findall(r"[a-z]+", caption)})
    lengths = [int(5 * 12.2 ** rng.random()) for _ in range(count - count // 3)]
    return load_prompts("tiny_heldout")[: count // 3] + [" ".join(rng.choices(words, k=length)) for length in lengths]


def draw_pairs(count: int, size: int, seed: int) -> torch.Tensor:
    """Return images of `count` pairs, the two of a pair side by side: [2 count, 3, size, size] float in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    scenes = F.interpolate(torch.rand(count, 3, 12, 12, generator=generator), (size, size), mode="bicubic")
    first = scenes + 0.05 * torch.randn(scenes.shape, generator=generator)
    second = first + NOISE / 255 * torch.randn(scenes.shape, generator=generator)
    return torch.stack([first, second], dim=1).flatten(0, 1).clamp(0, 1).to(DEVICE)


def timed(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Return ms an image, and what work gives for all images [N]."""
    synchronize()
    start = time.perf_counter()
    found = work()
    synchronize()
    return 1000 * (time.perf_counter() - start) / len(found), found


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def distance(values: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Return how far R [N] and dR of its pairs are from the reference's, in its standard deviations."""
    result = {}
    for name, (own, other) in {
        "R": (values, reference), "dR": (values[::2] - values[1::2], reference[::2] - reference[1::2]),
    }.items():  # fmt: skip
        difference = (own - other).double().abs() / other.double().std()
        result |= {f"{name} largest": float(difference.max()), f"{name} mean": float(difference.mean())}
    return result


def attempt(results: dict[str, dict], name: str, work: Callable[[], dict]) -> None:
    """Keep and print what work gives under a name; if it fails, why."""
    start = time.perf_counter()
    try:
        results[name] = work()
    except Exception as error:  # one variant that fails must not cost the others
        results[name] = {"error": f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:200]}"}
    results[name]["seconds in all"] = time.perf_counter() - start
    shown = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in results[name].items()}
    print(f"{name:40s} {', '.join(f'{key} {value}' for key, value in shown.items())}", flush=True)


class TimedJudge:
    """The project's judge under settings of a Variant, for fixed captions and images."""

    def __init__(self, name: str, captions: list[str], images: torch.Tensor):
        self.vlm, self.images, self.exact = judge.Vlm(name, Job(0, 1, DEVICE)), images, []
        self.texts = [self.vlm.dialogue(judge.QUESTIONS["vlm_alignment_train"], caption) for caption in captions]
        self.know_words()
        image_tokens = (judge.TRAINING_SIZE // 28) ** 2
        self.lengths = [len(row) - 1 + image_tokens for row in self.vlm.processor.tokenizer(self.texts)["input_ids"]]
        self.model, head = self.vlm.model, self.vlm.model.lm_head
        yes, no = head.weight[self.vlm.yes_no].float()
        head.register_forward_hook(lambda _, inputs, logits: self.exact.append(inputs[0][:, -1].float() @ (yes - no)))

    def know_words(self) -> None:
        """Make every word one token where the tokenizer is a small one, so that texts are about as long as with the true one."""
        tokenizer = self.vlm.processor.tokenizer
        words = {word for text in self.texts for word in re.findall(r" ?[A-Za-z]+", text)}
        if len(tokenizer) < 10_000:
            tokenizer.add_tokens(sorted(words))
            if len(tokenizer) > self.vlm.model.get_input_embeddings().num_embeddings:
                self.vlm.model.resize_token_embeddings(len(tokenizer))

    def batches(self, order: list[int], variant: Variant) -> list[list[int]]:
        """Return the images of each batch: of one filled length, in the given order."""
        groups = {}
        for i in order:
            groups.setdefault(-(-self.lengths[i] // variant.step), []).append(i)
        return [group[k : k + variant.rows] for group in groups.values() for k in range(0, len(group), variant.rows)]

    def margins(self, order: list[int], variant: Variant) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logit margins of the images in `order`, as the judge rounds them and from the last layer in float32: [N], else NaN."""
        judge.LENGTH_STEP, judge.MAX_BATCH = variant.step, variant.rows
        rounded, exact = torch.full((2, len(self.texts)), torch.nan, device=DEVICE)
        for rows in self.batches(order, variant):
            rounded[rows] = judge.yes_margins(self.vlm, [self.texts[i] for i in rows], self.images, rows, "training")
            exact[rows] = self.exact.pop()[: len(rows)]
        return rounded, exact

    @contextlib.contextmanager
    def compiled(self, variant: Variant) -> Iterator[None]:
        parts = {"vision": self.model.model.visual.blocks, "language": self.model.model.language_model.layers}
        blocks, settings = [(block, False) for name in variant.compiled for block in parts[name]], self.model.config.text_config
        cache, settings.use_cache = settings.use_cache, "language" not in variant.compiled  # a cache numbers the layers
        compile_blocks(blocks)
        try:
            yield
        finally:
            uncompile_blocks(blocks)
            settings.use_cache = cache

    def measure(self, variant: Variant, repeats: int) -> tuple[dict, torch.Tensor]:
        """Return the figures of a variant, and its margins in float32 [N]."""
        everything, half = list(range(len(self.texts))), list(range(len(self.texts) // 2))
        other = random.Random(0).sample(everything, len(everything))
        with self.compiled(variant):
            start = time.perf_counter()
            firsts = [group[0] for group in self.batches(everything, replace(variant, rows=len(everything)))]
            alone = [(i, self.margins([i], variant)[1][i]) for i in firsts]  # one of every length: warms up, too
            few = self.margins(half, variant)[1]
            ready = time.perf_counter() - start
            runs = [timed(lambda: self.margins(everything, variant)[1]) for _ in range(max(1, repeats - 1))]
            runs.append(timed(lambda: self.margins(other, variant)[1]))
        whole, shuffled = runs[0][1], runs[-1][1]
        equal = {
            "again": all(torch.equal(found, whole) for _, found in runs[:-1]),
            "among half": torch.equal(few[half], whole[half]), "alone": all(bool(value == whole[i]) for i, value in alone),
            "other order": torch.equal(shuffled, whole),
        }  # fmt: skip
        batches = self.batches(everything, variant)
        filled = variant.rows * sum(-(-self.lengths[rows[0]] // variant.step) * variant.step for rows in batches)
        return {
            "ms": statistics.median(ms for ms, _ in runs), "equal": all(equal.values()), "equal in company": equal,
            "tokens an image": filled / len(everything), "batches": len(batches), "warm-up s": ready,
        }, whole  # fmt: skip

    def split(self) -> dict[str, float]:
        """Return ms an image of the judge's parts, each waited for; the processor's includes the images' resizing."""
        everything, spent, last = list(range(len(self.texts))), Counter(), time.perf_counter()

        def mark(name: str) -> None:
            nonlocal last
            synchronize()
            spent[name] += 1000 * (time.perf_counter() - last) / len(everything)
            last = time.perf_counter()

        inner, names = self.model.model, ("processor", "embedding", "vision tower", "embedding", "language layers")
        before, after = nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook
        places = zip(names, (self.model, inner.visual, inner.visual, inner.language_model, inner.language_model), strict=True)
        kinds = (before, before, after, before, after)
        hooks = [kind(module, lambda *_, name=name: mark(name)) for kind, (name, module) in zip(kinds, places, strict=True)]
        self.margins(everything, Variant())
        for hook in hooks:
            hook.remove()
        return dict(spent)


def time_judge(config: JudgeSpeedConfig, captions: list[str], images: torch.Tensor) -> dict:
    """Measure fillings, compiled blocks, and both kinds of compiled blocks with the fastest filling that leaves margins equal."""
    timed_judge, results, margins = TimedJudge(config.vlm_model_name, captions, images), {}, []
    shares = {
        step: {length: count / len(captions) for length, count in sorted(lengths.items())}
        for step in (256, 128, 64, 32)
        for lengths in [Counter(-(-length // step) * step for length in timed_judge.lengths)]
    }
    print(f"tokens: {min(timed_judge.lengths)} to {max(timed_judge.lengths)}; share of each filled length: {shares}")

    def measure(variant: Variant) -> dict:
        figures, found = timed_judge.measure(variant, config.repeats)
        margins.append(found)
        return figures | distance(found, margins[0])

    for name, variant in (FILLINGS | COMPILED).items():
        attempt(results, name, lambda variant=variant: measure(variant))
    right = [name for name in FILLINGS if results[name].get("equal")]
    best = min(right or list(FILLINGS)[:1], key=lambda name: results[name].get("ms", 0))
    both = replace(FILLINGS[best], compiled=("vision", "language"))
    attempt(results, f"all compiled, {best}", lambda: measure(both))
    attempt(results, "parts, ms an image", timed_judge.split)
    attempt(results, "margins as rounded", lambda: distance(*timed_judge.margins(list(range(len(captions))), Variant())))
    return {"tokens": timed_judge.lengths, "shares": shares, "variants": results}


def time_pickscore(config: JudgeSpeedConfig, captions: list[str], images: torch.Tensor) -> dict:
    """Measure every way to run the CLIP scorer."""
    scorer, results, scores = ClipScorer(*CLIP_MODELS[config.clip], DEVICE), {}, []

    def measure(way: Callable[[], contextlib.AbstractContextManager]) -> dict:
        with way():
            start = time.perf_counter()
            scorer.score(captions, images)
            ready = time.perf_counter() - start
            runs = [timed(lambda: scorer.score(captions, images).float()) for _ in range(config.repeats)]
        scores.append(runs[0][1])
        again = all(torch.equal(found, scores[-1]) for _, found in runs)
        figures = {"ms": statistics.median(ms for ms, _ in runs), "equal again": again, "warm-up s": ready}
        return figures | distance(scores[-1], scores[0])

    for name, way in ways(scorer).items():
        attempt(results, name, lambda way=way: measure(way))
    spread = {"R": float(scores[0].std()), "dR": float((scores[0][::2] - scores[0][1::2]).std())}
    return {"spread of the scores as they are": spread, "variants": results}


def main(config: JudgeSpeedConfig) -> None:
    pairs = config.images // 2
    captions = [caption for caption in draw_captions(pairs, random.Random(config.seed)) for _ in range(2)]
    images = draw_pairs(pairs, config.size, config.seed)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    result = {"device": device, "config": to_dict(config), "versions": versions()}
    measure = {"judge": time_judge, "pickscore": time_pickscore}
    for part in config.parts:
        result[part] = measure[part](config, captions, images)
        if config.out is not None:
            config.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(JudgeSpeedConfig))
