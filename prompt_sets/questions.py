"""Make prompt_sets/questions.jsonl: prompts with yes/no questions, for the scorer `vlm_questions`.

python prompt_sets/questions.py
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

EACH, SEED = 40, 0  # prompts of each of the five kinds
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black", "pink", "brown")
THINGS = (
    "apple", "ball", "bicycle", "bird", "boat", "book", "bottle", "bowl", "bus", "car", "cat", "chair", "clock", "cow", "cup", "dog",
    "flower", "guitar", "hat", "horse", "kite", "lamp", "pear", "rabbit", "sheep", "shoe", "suitcase", "teapot", "train", "umbrella",
)  # fmt: skip
PLURALS = {"bus": "buses", "sheep": "sheep"}
NUMBERS = ("two", "three", "four", "five")
PLACES = ("left of", "right of", "above", "below", "in front of", "behind")
ATTRIBUTES = ("wooden", "glass", "striped", "spotted", "broken", "tiny", "wet", "rusty", "fluffy", "golden")
SCENES = ("on a table", "in a garden", "on a beach", "in an empty room", "in the snow", "on a street at night")


def a(words: str) -> str:
    """Return words with their article."""
    return f"{'an' if words[0] in 'aeio' or words.startswith('um') else 'a'} {words}"


def counting(draw: random.Random) -> tuple[str, list[str]]:
    number, thing, scene = draw.choice(NUMBERS), draw.choice(THINGS), draw.choice(SCENES)
    plural = PLURALS.get(thing, f"{thing}s")
    return f"a photo of {number} {plural} {scene}", [
        f"Are there {plural} in the image?", f"Are there exactly {number} {plural} in the image?", f"Are the {plural} {scene}?",
    ]  # fmt: skip


def colours(draw: random.Random) -> tuple[str, list[str]]:
    colour, thing, scene = draw.choice(COLOURS), draw.choice(THINGS), draw.choice(SCENES)
    return f"{a(colour)} {thing} {scene}", [f"Is there {a(thing)} in the image?", f"Is the {thing} {colour}?"]


def positions(draw: random.Random) -> tuple[str, list[str]]:
    one, two, place = *draw.sample(THINGS, 2), draw.choice(PLACES)
    return f"{a(one)} {place} {a(two)}", [
        f"Is there {a(one)} in the image?", f"Is there {a(two)} in the image?", f"Is the {one} {place} the {two}?",
    ]  # fmt: skip


def two_objects(draw: random.Random) -> tuple[str, list[str]]:
    (one, two), (first, second) = draw.sample(THINGS, 2), draw.sample(COLOURS, 2)
    return f"{a(first)} {one} and {a(second)} {two}", [
        f"Is there {a(one)} in the image?", f"Is the {one} {first}?", f"Is there {a(two)} in the image?", f"Is the {two} {second}?",
    ]  # fmt: skip


def attributes(draw: random.Random) -> tuple[str, list[str]]:
    attribute, thing, scene = draw.choice(ATTRIBUTES), draw.choice(THINGS), draw.choice(SCENES)
    return f"{a(attribute)} {thing} {scene}", [
        f"Is there {a(thing)} in the image?", f"Is the {thing} {attribute}?", f"Is the {thing} {scene}?",
    ]  # fmt: skip


KINDS: tuple[Callable[[random.Random], tuple[str, list[str]]], ...] = (counting, colours, positions, two_objects, attributes)


def lines() -> list[str]:
    """Return the lines of the set, all prompts different, EACH of each kind."""
    draw, found = random.Random(SEED), {}
    for i, kind in enumerate(KINDS, 1):
        while len(found) < i * EACH:
            prompt, questions = kind(draw)
            found[prompt] = json.dumps({"prompt": prompt, "questions": questions})
    return list(found.values())


if __name__ == "__main__":
    Path(__file__).with_suffix(".jsonl").write_text("\n".join(lines()) + "\n")
