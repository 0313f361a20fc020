"""Prompt sets: loads them, chooses from them, and says which prompt each pair of an epoch gets."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fdfo.config.errors import UserError

LONGEST_PROMPT = 100_000  # characters
HOLD_OUT_SEED = 0x0E7A
PROMPT_SETS = Path(__file__).parent.parent.parent / "prompt_sets"
PICKSCORE_COMMAND = (
    "curl -L -o prompt_sets/pickscore_train.txt https://raw.githubusercontent.com/yifan123/flow_grpo/"
    "9745241cf1101407e9b518dd4f10498092150522/dataset/pickscore/train.txt"
)
PUBLISHED_SHA256 = {"pickscore_train": "2f425adcbb9a6d0feee7c6c448e1cb83a1f71deca9434b803907e2578eca837f"}


def load_prompts(name: str) -> list[str]:
    """Load a set in prompt_sets/, or a text file with one prompt per line; blank lines are left out.

    Raises UserError if there is no such set or file, if it is empty, or if it is not the published file.
    """
    path = Path(name) if "/" in name or name.endswith(".txt") else PROMPT_SETS / f"{name}.txt"
    if not os.path.isfile(path):
        if name == "pickscore_train":
            raise UserError(f"The prompt set pickscore_train is not here yet: fetch it with\n  {PICKSCORE_COMMAND}")
        known = ", ".join(sorted({p.stem for p in PROMPT_SETS.glob("*.txt")} | {"hpdv2", "pickscore_train"}))
        raise UserError(f"There is no prompt set {name[:300]!r}: give a text file with one prompt per line, or one of {known}.")
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
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"The prompt file {path} has no prompts: write one prompt per line.")
    if max(map(len, prompts)) > LONGEST_PROMPT:
        raise UserError(f"The prompt file {path} has a line of more than {LONGEST_PROMPT} characters: write one prompt per line.")
    return prompts


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
