"""Prompt sets, and which prompt belongs to which pair."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fdfo.config import UserError
from fdfo.manifest import is_file, read_bounded

LARGEST_PROMPT_FILE, LONGEST_PROMPT = 2**28, 100_000  # bytes; characters
HOLD_OUT_SEED = 0x0E7A
PROMPT_SETS = Path(__file__).parent.parent / "prompt_sets"
PICKSCORE_COMMAND = (
    "curl -L -o prompt_sets/pickscore_train.txt https://raw.githubusercontent.com/yifan123/flow_grpo/"
    "9745241cf1101407e9b518dd4f10498092150522/dataset/pickscore/train.txt"
)
PUBLISHED_SHA256 = {"pickscore_train": "2f425adcbb9a6d0feee7c6c448e1cb83a1f71deca9434b803907e2578eca837f"}


def load_prompts(name: str) -> list[str]:
    """The prompts of a set in prompt_sets/, or of a text file with one prompt a line; blank lines are left out.

    Raises UserError when there is no such set or file, nothing in it, or something else than was published.
    """
    path = Path(name) if "/" in name or name.endswith(".txt") else PROMPT_SETS / f"{name}.txt"
    if not is_file(path):
        if name == "pickscore_train":
            raise UserError(f"The prompt set pickscore_train is not here yet: fetch it with\n  {PICKSCORE_COMMAND}")
        known = ", ".join(sorted({p.stem for p in PROMPT_SETS.glob("*.txt")} | {"hpdv2", "pickscore_train"}))
        raise UserError(f"There is no prompt set {name[:300]!r}: give a text file with one prompt a line, or one of {known}.")
    try:
        content = read_bounded(path, LARGEST_PROMPT_FILE)
    except (OSError, ValueError) as error:
        raise UserError(f"The prompt file {path} cannot be read ({error}): give a readable text file.") from error
    if name in PUBLISHED_SHA256 and hashlib.sha256(content).hexdigest() != PUBLISHED_SHA256[name]:
        raise UserError(f"{path} is not the published file (its SHA-256 differs): fetch it again with\n  {PICKSCORE_COMMAND}")
    try:
        lines = content.decode("utf-8-sig").split("\n")  # no other character ends a prompt
    except UnicodeDecodeError as error:
        raise UserError(f"The prompt file {path} is not UTF-8 text: save it as UTF-8.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"The prompt file {path} has no prompts: write one prompt a line.")
    if max(map(len, prompts)) > LONGEST_PROMPT:
        raise UserError(f"The prompt file {path} has a line of more than {LONGEST_PROMPT} characters: write one prompt a line.")
    return prompts


@dataclass(frozen=True)
class ChosenPrompt:
    """A prompt to evaluate on, and its number among the set's prompts, from 0."""

    number: int
    text: str


def choose_prompts(prompts: list[str], count: int, seed: int) -> list[ChosenPrompt]:
    """The first `count` of the set, shuffled (METHOD.md 5). Raises UserError when the set is smaller."""
    if count > len(prompts):
        raise UserError(f"The prompt set has {len(prompts)} prompts: lower --num-prompts to that or less.")
    order = np.arange(len(prompts))
    np.random.RandomState(seed).shuffle(order)
    return [ChosenPrompt(int(number), prompts[number]) for number in order[:count]]


def hold_out(prompts: list[str], count: int) -> tuple[list[str], list[str]]:
    """Splits prompts to evaluate on off a set: (training prompts, held-out ones), the same for every run on that set.

    No training prompt has the text of a held-out one. Raises UserError when the set has too few different prompts.
    """
    different = sorted(set(prompts))
    if not count < len(different):
        raise UserError(
            f"The prompt set has {len(different)} different prompts, and {count} of them are to be held out: lower --eval-prompts."
        )
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(different))[:count]
    held_out = [different[i] for i in order]
    taken = set(held_out)
    return [prompt for prompt in prompts if prompt not in taken], held_out


def epoch_prompts(prompts: list[str], epoch: int, pairs: int, seed: int) -> list[str]:
    """The prompt of every pair of an epoch: a walk through one seeded permutation of the set after another.

    Pair k of the epoch stands at position epoch * pairs + k of that walk, which knows no ranks and no history.
    """
    positions = np.arange(epoch * pairs, (epoch + 1) * pairs)
    order = {lap: np.random.default_rng([seed, lap]).permutation(len(prompts)) for lap in set(positions // len(prompts))}
    return [prompts[order[p // len(prompts)][p % len(prompts)]] for p in positions]
