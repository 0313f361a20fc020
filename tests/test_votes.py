"""python -m fdfo.votes: what it counts, what it says of a scorer, and the data set that it writes."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fdfo.tiny.scenes import parse_caption, render
from fdfo.vote_page.desk import VOTES
from fdfo.vote_page.images import write_image
from fdfo.vote_page.votes_file import Vote, VotesFile
from fdfo.votes.agreement import between_people, everybodys_habits, habits, warnings

RIGHT, WRONG = "a red ring on a blue background", "a green cross on a white background"
VOTE = Vote(6, 0, 0, RIGHT, "first", "first", "Ann", 1, 1.0, "2026-01-01T00:00:00Z")


def but(**values: object) -> Vote:
    return dataclasses.replace(VOTE, **values)


VOTES_OF_TWO = [
    but(pair=0), but(pair=1, choice="second"), but(pair=2, choice="tie", seconds=3.0), but(pair=3, choice="both_bad"),
    but(pair=4), but(pair=4, choice="undo"), but(pair=4, choice="second", left="second"),
    but(pair=0, showing=2, left="second"), but(pair=1, showing=2, choice="tie"),
    but(pair=5, person="Bo é", seconds=2.0), but(pair=2, showing=2, person="Bo é", choice="both_bad"),
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of six pairs, in which image a of every pair is the right one."""
    folder = tmp_path / "00000-human-cfg_1p0"
    for pair in range(6):
        for branch, caption in enumerate((RIGHT, WRONG)):
            image = render([parse_caption(caption)], torch.Generator().manual_seed(pair))[0]
            write_image(folder / "votes" / "0" / f"{pair}-{branch}.jpg", (255 * image).to(torch.uint8))
    file = VotesFile(folder / VOTES)
    for vote in VOTES_OF_TWO:
        file.append(vote)
    return folder


def test_habits_are_counted_per_person_and_together():
    scores = {(0, pair): 50.0 for pair in range(5)} | {(0, 4): 0.0, (0, 5): float("nan")}
    ann, bo, both = everybodys_habits(VOTES_OF_TWO, scores)
    assert (ann.votes, ann.ties.hits, ann.both_bad.hits, ann.taken_back, ann.seconds) == (7, 2, 1, 1, 1.0)
    assert (ann.left.hits, ann.left.count) == (2, 4)
    assert (ann.again.hits, ann.again.count) == (1, 2)
    assert (ann.scorer.hits, ann.scorer.count) == (2, 3)  # a scorer that is not decided, or fails, says nothing
    assert (bo.votes, bo.again.count, bo.scorer.count, bo.seconds) == (2, 0, 0, 1.5)
    assert (both.person, both.votes, both.again.count, both.taken_back) == ("all", 9, 2, 1)
    people = between_people(VOTES_OF_TWO)
    assert (people.hits, people.count) == (1, 1)  # a tie and both bad are worth the same


def test_a_habit_of_one_side_is_a_warning():
    left = [but(pair=pair) for pair in range(80)]
    right = [but(pair=pair, choice="second") for pair in range(80, 120)]
    (said,) = warnings([habits("Ann", left + right, {})])
    assert said.startswith("Ann chooses the left image in 67 +- 4.3 %")
    assert warnings([habits("Ann", left[:30] + right[:25], {})]) == []


def test_the_command_prints_a_line_per_person_and_writes_a_data_set(run: Path, run_cli: Callable, tmp_path: Path):
    out = tmp_path / "preferences"
    code, said, _ = run_cli("fdfo.votes.__main__", run, "--scorer", "scene", "--export", out)
    assert code == 0 and said.startswith(f"9 votes on 6 pairs of 1 epochs in {run}\nperson ") and "like scene" in said
    assert "two people on the same pair choose alike in 100 +- 0.0 % of 1 pairs" in said
    (ann,) = [line for line in said.splitlines() if line.startswith("Ann")]
    assert ann.split() == "Ann 7 29 % 14 % 1 1.0 50 +- 25.0 % 50 +- 35.4 % of 2 50 +- 25.0 %".split()
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 9 and [line["choice"] for line in lines[:4]] == ["a", "b", "tie", "both_bad"]
    assert lines[4]["left"] == "b" and lines[7]["person"] == "Bo é" and lines[0]["prompt"] == RIGHT
    for line in lines:
        for letter, branch in (("a", 0), ("b", 1)):
            image = run / "votes" / "0" / f"{line['pair']}-{branch}.jpg"
            assert (out / line[f"image_{letter}_file_name"]).read_bytes() == image.read_bytes()


def test_wrong_input_is_one_sentence(run: Path, run_cli: Callable, tmp_path: Path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / VOTES).touch()
    (run / "votes" / "0" / "5-1.jpg").unlink()
    for arguments, says in {
        (tmp_path,): "has no votes.jsonl",
        (empty,): "has no vote yet",
        (run, "--scorer", "nobody"): "There is no scorer 'nobody'",
        (run, "--scorer", "pixel_diversity"): "compares many images",
        (run, "--scorer", "scene"): "5-1.jpg is not there",
        (run, "--export", tmp_path / "new"): "5-1.jpg is not there",
        (run, "--export", empty): "exists already",
        (run, "--export", tmp_path / "no" / "where"): "cannot be written",
    }.items():
        code, _, err = run_cli("fdfo.votes.__main__", *arguments)
        assert code == 2 and says in err and err.count("\n") == 1, err
    assert not (tmp_path / "new").exists()
