"""Scorers that fail in every way, ranks that die or hang, and runs that do not learn: told, and stopped where they must be."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN, torchrun
from test_training import log_of, small

from fdfo.checkpoint import find_checkpoint
from fdfo.config import UserError
from fdfo.distributed import Job
from fdfo.health import Health, Signs, one_colour
from fdfo.trainer import train
from fdfo.update import StepStats


def scored_by(name: str) -> dict:
    return {"reward_specs": (f"own_scorers:{name}=1",)}


def test_a_score_in_a_hundred_that_is_not_finite_is_counted_and_its_pair_dropped(job: Job, tmp_path: Path, capsys):
    quick = dict(total_pairs_per_epoch=50, gradient_steps_per_epoch=1, num_epochs=2)
    run = train(job, small(tmp_path, **quick, **scored_by("SometimesNotANumber")), None)
    epochs = log_of(run.folder, "epoch")
    assert [epoch["dropped_pairs"] for epoch in epochs] == [1, 1] and all(epoch["scores"] for epoch in epochs)
    assert all(p.isfinite().all() for p in run.model.trainable()) and "dropped" not in capsys.readouterr().out


def test_a_scorer_that_fails_once_is_tried_again(job: Job, tmp_path: Path, capsys):
    run = train(job, small(tmp_path, num_epochs=3, **scored_by("FailsOnce")), None)
    assert len(log_of(run.folder, "epoch")) == 3
    assert capsys.readouterr().err.count("FailsOnce failed (ConnectionError: the judge hung up) and is tried again") == 1


def test_a_scorer_that_goes_on_failing_stops_the_run_by_name(job: Job, tmp_path: Path):
    config = small(tmp_path, num_epochs=3, save_freq=1, **scored_by("FailsFromThen"))
    with pytest.raises(UserError, match="The scorer own_scorers:FailsFromThen failed twice in a row .ConnectionError"):
        train(job, config, None)
    assert len(log_of(tmp_path / "00000-custom-cfg_1p0", "epoch")) == 1
    assert find_checkpoint(str(tmp_path / "00000-custom-cfg_1p0")).folder.name == "epoch-0000001"


def test_a_scorer_that_hangs_is_ended_by_the_timeout(tmp_path: Path):
    flags = ("--save-freq", 1, "--num-epochs", 3, "--timeout-minutes", 0.05, "--runs-dir", tmp_path)
    command = [sys.executable, "train.py", *TINY_RUN, *flags, "--reward-specs", "tests.own_scorers:Hangs=1.0"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 3 and "rank 0 made no progress for 0.05 minutes in reward of epoch 2" in done.stderr
    run = tmp_path / "00000-custom-cfg_1p0"
    assert len(log_of(run, "epoch")) == 1 and find_checkpoint(str(run)).folder.name == "epoch-0000001"


@pytest.mark.parametrize("name,rank", [("Hangs", "1"), ("Dies", "1")])
def test_a_rank_that_hangs_or_dies_ends_the_job_with_its_name_and_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rank: str
):
    monkeypatch.setenv("HANG_RANK", rank)
    flags = ("--num-epochs", 3, "--timeout-minutes", 0.1, "--runs-dir", tmp_path)
    done = torchrun(2, "train.py", *TINY_RUN, *flags, "--reward-specs", f"tests.own_scorers:{name}=1.0")
    assert done.returncode != 0 and "rank 1 in reward of epoch 2" in done.stderr.replace(
        "rank 1 made no progress for 0.1 minutes", "rank 1"
    )


STEP = StepStats(0.1, 0.1, 1.0, 1.0, 2.0, 1.0, True)
GOOD = Signs(1.0, 0.0, 0.0, 1e-3, [STEP] * 4)


@pytest.mark.parametrize(
    "change,says",
    [
        ({}, None),
        ({"differing_pairs": 0.0}, "0.0% of the pairs differ in reward"),
        ({"differing_pairs": math.nan}, "of the pairs differ in reward"),
        ({"dropped_pairs": 0.06}, "6.0% of the pairs were dropped"),
        ({"one_colour": 0.9}, "of one colour"),
        ({"adapter_change": 0.0}, "has not moved"),
        ({"grad_norm": 0.0}, "the gradient norm of step 1 is 0"),
        ({"grad_norm": 201.0}, "the gradient norm of step 1 is 201 where 2 is usual"),
        ({"ratio_mean": 3.0}, "mean ratio is 3"),
        ({"ratio_mean": math.nan}, "mean ratio is nan"),
        ({"clipfrac": 0.95}, "clipfrac is 0.95"),
        ({"ratio_first": 1.1}, "the ratio at unchanged weights is 1.1000"),
    ],
)
def test_every_sign_of_a_run_that_does_not_learn_has_its_warning(change: dict, says: str | None):
    fields = {field.name for field in dataclasses.fields(StepStats)}
    step = dataclasses.replace(STEP, **{name: value for name, value in change.items() if name in fields})
    signs = dataclasses.replace(GOOD, steps=[step, *GOOD.steps[1:]], **{k: v for k, v in change.items() if k not in fields})
    found = Health("fp32", [2.0] * 8).check(signs)
    assert len(found) == (says is not None) and all(says in text for text in found)


def test_pictures_of_one_colour_are_seen():
    images = torch.rand(4, 3, 8, 8)
    images[1], images[2] = 0.5, torch.tensor([0.1, 0.5, 0.9])[:, None, None]
    assert one_colour(images).tolist() == [0, 1, 1, 0]


def test_strict_stops_with_a_checkpoint_and_the_warning_is_in_the_log(job: Job, tmp_path: Path, capsys):
    """A reward of two values, and churn so weak that the branches of a pair never differ in it."""
    config = small(tmp_path, num_epochs=3, strict=True, save_freq=3, **scored_by("ConstantLater"))
    with pytest.raises(UserError, match="--strict stops after epoch 2, with a checkpoint: 0.0% of the pairs differ in reward"):
        train(job, config, None)
    run = tmp_path / "00000-custom-cfg_1p0"
    assert find_checkpoint(str(run)).folder.name == "epoch-0000002"
    assert [len(epoch["warnings"]) > 0 for epoch in log_of(run, "epoch")] == [False, True]
    assert "warning: epoch 2: 0.0% of the pairs differ in reward" in capsys.readouterr().out
    loose = train(job, dataclasses.replace(config, strict=False), find_checkpoint(str(run)))
    assert loose.progress.epochs == 3
