"""The votes of a run as a preference data set: images and metadata.jsonl, which `datasets.load_dataset(FOLDER)` reads.

Parquet would need pyarrow, a package of 55 MB that nothing else here uses.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from fdfo.config.errors import UserError
from fdfo.evaluation.image_folder import read_image
from fdfo.storage.atomic_files import atomic_folder
from fdfo.vote_page.desk import IMAGES
from fdfo.vote_page.votes_file import Vote
from rewards.scorer import Scorer, checked_scores

SLICE = 32  # pairs that are scored at a time
NAMES = {"first": "a", "second": "b"}
CARD = """# Preferences of people between two images

{votes} votes on images of one prompt, from {run}. `choice` is a, b, tie or both_bad; `left` is the image that was on the left.

    from datasets import load_dataset
    votes = load_dataset("FOLDER", split="train")  # image_a, image_b, prompt, choice, person, ...
    votes.to_parquet("votes.parquet")
"""


def pair_files(run: Path, epoch: int, pair: int) -> list[Path]:
    """Return the files of both images of a pair. Raises UserError if one is not there."""
    files = [run / IMAGES / str(epoch) / f"{pair}-{branch}.jpg" for branch in (0, 1)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is not there, and a vote needs it: restore it, or leave --scorer and --export out.")
    return files


def pair_scores(run: Path, votes: list[Vote], name: str, scorer: Scorer) -> dict[tuple[int, int], float]:
    """Return a scorer's difference, image a minus image b, for each pair that was judged, by (epoch, pair). Raises UserError."""
    prompts = {(vote.epoch, vote.pair): vote.prompt for vote in votes}
    scores: dict[tuple[int, int], float] = {}
    for keys in slices(list(prompts)):
        images = torch.stack([opened(file) for key in keys for file in pair_files(run, *key)])  # [2P, 3, H, W]
        texts = [prompts[key] for key in keys for _ in range(2)]
        first, second = checked_scores(name, scorer, texts, images).unflatten(0, (-1, 2)).unbind(1)
        scores |= dict(zip(keys, (first - second).tolist(), strict=True))
    return scores


def slices(keys: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    for start in range(0, len(keys), SLICE):
        yield keys[start : start + SLICE]


def opened(file: Path) -> torch.Tensor:
    """Read an image [3, H, W] uint8. Raises UserError."""
    image = read_image(file)
    if image is None:
        raise UserError(f"{file} is no image: restore it, or leave --scorer out.")
    return image


def write_dataset(run: Path, votes: list[Vote], out: Path) -> None:
    """Write the standing votes, and the images that they judge, into a new folder. Raises UserError."""
    try:
        with atomic_folder(out) as folder:
            (folder / "images").mkdir()
            lines = [json.dumps(row(run, vote, folder), ensure_ascii=False) + "\n" for vote in votes]
            (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
            (folder / "README.md").write_text(CARD.format(votes=len(votes), run=run.name), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give --export another folder.") from error


def row(run: Path, vote: Vote, folder: Path) -> dict:
    """Return the line of a vote, after copying its images; `datasets` makes an image of each column named ..._file_name."""
    names = {}
    for letter, file in zip("ab", pair_files(run, vote.epoch, vote.pair), strict=True):
        names[letter] = f"images/{vote.epoch}-{vote.pair}-{letter}.jpg"
        shutil.copyfile(file, folder / names[letter])
    return {
        "image_a_file_name": names["a"],
        "image_b_file_name": names["b"],
        "prompt": vote.prompt,
        "choice": NAMES.get(vote.choice, vote.choice),
        "left": NAMES[vote.left],
        "person": vote.person,
        "seconds": vote.seconds,
        "epoch": vote.epoch,
        "pair": vote.pair,
        "showing": vote.showing,
        "time": vote.time,
    }
