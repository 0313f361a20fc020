"""Prompt sets: loads them, chooses from them, and says which prompt each pair of an epoch gets."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from fdfo.config.errors import UserError
from fdfo.storage.atomic_files import json_hash

LONGEST_PROMPT = 100_000  # characters
HOLD_OUT_SEED = 0x0E7A
PROMPT_SETS = Path(__file__).parent.parent.parent / "prompt_sets"
PICKSCORE_COMMAND = (
    "curl -L -o prompt_sets/pickscore_train.txt https://raw.githubusercontent.com/yifan123/flow_grpo/"
    "9745241cf1101407e9b518dd4f10498092150522/dataset/pickscore/train.txt"
)
QUESTIONS_SUFFIX = ".jsonl"
SUFFIXES = (".txt", QUESTIONS_SUFFIX)
PUBLISHED_SHA256 = {"pickscore_train": "2f425adcbb9a6d0feee7c6c448e1cb83a1f71deca9434b803907e2578eca837f"}


class Line(TypedDict):
    """A line of a .jsonl file."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # as a misspelled "questions" would be left out otherwise

    prompt: str
    questions: NotRequired[list[str]]


QUESTIONS_LINE = TypeAdapter(Line)


class Prompt(str):
    """A prompt with questions about its image, for the scorer vlm_questions. To all else it is its text."""

    questions: tuple[str, ...]

    def __new__(cls, text: str, questions: Iterable[str] = ()) -> "Prompt":
        prompt = super().__new__(cls, text)
        prompt.questions = tuple(questions)
        return prompt


def questions_of(prompt: str) -> tuple[str, ...]:
    """Return the questions of a prompt, none for one from a plain text file."""
    return prompt.questions if isinstance(prompt, Prompt) else ()


def prompts_hash(prompts: list[str]) -> str:
    """Return a hash of prompts and their questions; of plain prompts it is that of their texts."""
    return json_hash([[prompt, *questions_of(prompt)] if questions_of(prompt) else prompt for prompt in prompts])


def load_prompts(name: str) -> list[str]:
    """Load a set in prompt_sets/, or a file: text with one prompt per line, or .jsonl with questions. Blank lines are left out.

    Raises UserError if there is no such set or file, if it is empty, or if it is not the published file.
    """
    path = find_prompts(name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"The prompt file {path} cannot be read ({error}): give a readable text file.") from error
    if name in PUBLISHED_SHA256 and hashlib.sha256(content).hexdigest() != PUBLISHED_SHA256[name]:
        raise UserError(f"{path} is not the published file (its SHA-256 differs): fetch it again with\n  {PICKSCORE_COMMAND}")
    try:
        lines = content.decode("utf-8-sig").split("\n")  # no other character ends a prompt
    except UnicodeDecodeError as error:
        raise UserError(f"The prompt file {path} is not UTF-8 text: save it as UTF-8.") from error
    if path.suffix == QUESTIONS_SUFFIX:
        prompts = [read_prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"The prompt file {path} has no prompts: write one prompt per line.")
    if max(map(len, prompts)) > LONGEST_PROMPT:
        raise UserError(f"The prompt file {path} has a line of more than {LONGEST_PROMPT} characters: write one prompt per line.")
    return prompts


def find_prompts(name: str) -> Path:
    """Return the file of a prompt set. Raises UserError if there is none."""
    if "/" in name or name.endswith(SUFFIXES):
        path = Path(name)
    else:
        path = next(filter(os.path.isfile, (PROMPT_SETS / f"{name}{suffix}" for suffix in SUFFIXES)), PROMPT_SETS / f"{name}.txt")
    if not os.path.isfile(path):
        if name == "pickscore_train":
            raise UserError(f"The prompt set pickscore_train is not here yet: fetch it with\n  {PICKSCORE_COMMAND}")
        here = {p.stem for suffix in SUFFIXES for p in PROMPT_SETS.glob(f"*{suffix}")}
        known = ", ".join(sorted(here | {"hpdv2", "pickscore_train"}))
        raise UserError(f"There is no prompt set {name[:300]!r}: give a text file with one prompt per line, or one of {known}.")
    return path


def read_prompt(path: Path, number: int, line: str) -> Prompt:
    """Read a line of a .jsonl file; a line break inside a text becomes a blank. Raises UserError, naming the line."""
    try:
        found = QUESTIONS_LINE.validate_json(line)
    except ValidationError as error:
        raise UserError(
            f'Line {number} of {path} is not {{"prompt": "...", "questions": ["...", ...]}} ({error.errors()[0]["msg"]}): correct it.'
        ) from error
    text, *questions = (" ".join(text.split()) for text in (found["prompt"], *found.get("questions", ())))
    if not text or not all(questions):
        raise UserError(f"Line {number} of {path} has an empty prompt or question: write a text.")
    return Prompt(text, questions)


@dataclass(frozen=True)
class ChosenPrompt:
    """A prompt to evaluate on, and its number among the set's prompts, from 0."""

    number: int
    text: str


def choose_prompts(prompts: list[str], count: int, seed: int) -> list[ChosenPrompt]:
    """Return the first `count` prompts of the shuffled set (docs/method.md 5). Raises UserError if the set is smaller."""
    if count > len(prompts):
        raise UserError(f"The prompt set has {len(prompts)} prompts: lower --num-prompts to that or less.")
    order = np.arange(len(prompts))
    np.random.RandomState(seed).shuffle(order)
    return [ChosenPrompt(int(number), prompts[number]) for number in order[:count]]


def hold_out(prompts: list[str], count: int) -> tuple[list[str], list[str]]:
    """Split a set into training prompts and `count` held-out ones, the same for every run on that set.

    No training prompt has the text of a held-out one. Raises UserError if the set has too few different prompts.
    """
    different = sorted(set(prompts))
    if not count < len(different):
        raise UserError(
            f"The prompt set has {len(different)} different prompts, too few to hold out {count}: lower --eval-prompts."
        )
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(different))[:count]
    held_out = [different[i] for i in order]
    taken = set(held_out)
    return [prompt for prompt in prompts if prompt not in taken], held_out


def epoch_prompts(prompts: list[str], epoch: int, pairs: int, seed: int) -> list[str]:
    """Return the prompt of every pair of an epoch: a walk through one seeded permutation of the set after another.

    Pair k of the epoch has position epoch * pairs + k in that walk, whatever the rank or history.
    """
    positions = np.arange(epoch * pairs, (epoch + 1) * pairs)
    order = {lap: np.random.default_rng([seed, lap]).permutation(len(prompts)) for lap in set(positions // len(prompts))}
    return [prompts[order[p // len(prompts)][p % len(prompts)]] for p in positions]
