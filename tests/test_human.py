"""Runs that people judge: over HTTP as the page does, stopped, killed, left alone, and again from their recorded votes."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from ranks import run_ranks
from safetensors.torch import load_file
from signal_inside import signal_inside
from test_training import comparable, log_of, small
from voters import Voting, free_port

from fdfo.config.command_line import parse_train_config
from fdfo.config.errors import UserError
from fdfo.config.train_options import OptimConfig, TrainConfig
from fdfo.distributed.job import Job
from fdfo.distributed.shutdown import Guard, Stopped
from fdfo.method.trainer import train
from fdfo.run_folder.find_checkpoint import find_checkpoint, read_config
from fdfo.run_folder.start import find_start
from fdfo.vote_page.votes_file import read_votes

JOB = Job(0, 1, torch.device("cpu"))
PAIRS = 6


def judged(folder: Path, **changes) -> TrainConfig:
    """A run of seconds that people judge."""
    quick = dict(reward_preset="human", human_port=free_port(), num_epochs=2, save_freq=1, eval_metrics=("scene",))
    return small(folder, **(quick | changes))


def replayed(config: TrainConfig, run: Path, folder: Path) -> Path:
    """The run again, from its votes alone."""
    again = dataclasses.replace(config, votes=run / "votes.jsonl", runs_dir=folder, human_timeout=60.0)
    return train(JOB, again).folder


def same_end(one: Path, two: Path, epochs: int) -> bool:
    """Whether adapter, optimizer and log are equal to the bit."""
    names = ("adapter_model.safetensors", "training_state.safetensors")
    ends = [load_file(run / "checkpoints" / f"epoch-{epochs:07d}" / name) for run in (one, two) for name in names]
    same = all(torch.equal(ends[i][key], ends[i + 2][key]) for i in (0, 1) for key in ends[i])
    return same and comparable(one) == comparable(two)


def places(run: Path) -> list[tuple[int, int, int]]:
    return sorted((vote.epoch, vote.pair, vote.showing) for vote in read_votes(run / "votes.jsonl"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """A run of two epochs that one person has judged to the end."""
    config = judged(tmp_path_factory.mktemp("judged"), eval_prompts=2, eval_every=1, sample=small(Path()).sample)
    with Voting(config.human_port) as ann:
        folder = train(JOB, config).folder
    assert sorted(ann.kept) == [(epoch, pair, 1) for epoch in range(2) for pair in range(PAIRS)] == places(folder)
    return config, folder


def test_recorded_votes_train_the_same_adapter(run: tuple[TrainConfig, Path], tmp_path: Path):
    config, folder = run
    assert same_end(folder, replayed(config, folder, tmp_path), 2)
    (first, _), evaluations = log_of(folder, "epoch"), log_of(folder, "eval")
    assert first["unjudged_pairs"] == 0 and first["differing_pairs"] > 0 and "votes" in first["seconds"]
    assert [set(line["scores"]) for line in evaluations] == [{"scene"}] * 3
    shown = json.loads((folder / "votes" / "held-out.json").read_text())
    assert [line["epoch"] for line in shown["evaluations"]] == [0, 1, 2] and len(shown["prompts"]) == 2
    assert len(list((folder / "votes" / "1").glob("*.jpg"))) == 2 * PAIRS


@pytest.mark.parametrize(
    "changes,says",
    [
        (dict(seed=7), "has votes for the seed 6, and --seed is 7"),
        (dict(num_epochs=3), "has no votes for epoch 3: set --num-epochs to 2"),
        (dict(total_pairs_per_epoch=7), "has a vote on another prompt for pair 0 of epoch 2"),
        (dict(prompt_set="tiny_heldout", eval_prompt_set=None), "has a vote on another prompt for pair 0 of epoch 1"),
    ],
)
def test_votes_of_another_run_are_refused(run: tuple[TrainConfig, Path], tmp_path: Path, changes: dict, says: str):
    config, folder = run
    with pytest.raises(UserError, match=says):
        replayed(dataclasses.replace(config, **changes), folder, tmp_path)
    assert not list(tmp_path.iterdir())


def abandoned(config: TrainConfig, run: Path, folder: Path) -> Path:
    """A run of one epoch, to whose page nobody came; it has stopped with a checkpoint."""
    config = dataclasses.replace(config, runs_dir=folder, num_epochs=1, human_timeout=1e-4, human_port=free_port())
    with pytest.raises(Stopped, match="0 pairs of epoch 1 have votes, less than --human-enough 0.5 of them"):
        train(JOB, config)
    assert find_checkpoint(str(folder / run.name)).folder.name == "epoch-0000000"
    return folder / run.name


def add_votes(run: Path, folder: Path, count: int) -> None:
    """Copy the first votes of a run to another one."""
    (folder / "votes.jsonl").write_text("".join((run / "votes.jsonl").read_text().splitlines(keepends=True)[:count]))


def test_an_epoch_goes_on_without_the_rest(run: tuple[TrainConfig, Path], tmp_path: Path):
    """4 of 6 pairs are enough."""
    config, judged_run = run
    folder = abandoned(config, judged_run, tmp_path / "enough")
    add_votes(judged_run, folder, 4)
    train(JOB, read_config(folder), find_start(str(folder)))
    (epoch,) = log_of(folder, "epoch")
    assert epoch["unjudged_pairs"] == epoch["dropped_pairs"] == 2 and not [
        text for text in epoch["warnings"] if "dropped" in text
    ]
    assert same_end(folder, replayed(read_config(folder), folder, tmp_path / "again"), 1)


def test_a_run_stops_if_too_few_pairs_are_judged(run: tuple[TrainConfig, Path], tmp_path: Path):
    """2 of 6 pairs are not enough. When the run goes on, it asks for the others alone."""
    config, judged_run = run
    folder = abandoned(config, judged_run, tmp_path / "few")
    add_votes(judged_run, folder, 2)
    with pytest.raises(Stopped, match="2 pairs of epoch 1 have votes"):
        train(JOB, read_config(folder), find_start(str(folder)))
    config = dataclasses.replace(read_config(folder), human_timeout=60.0)
    with Voting(config.human_port, "Ben") as ben:
        train(JOB, config, find_start(str(folder)))
    assert len(ben.kept) == 4 and places(folder) == [(0, pair, 1) for pair in range(PAIRS)]
    assert same_end(folder, replayed(config, folder, tmp_path / "again"), 1)


def test_a_run_that_waits_is_neither_ended_nor_deaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Waiting is progress to the watch of --timeout-minutes. A signal stops it with a checkpoint; later one comes inside the update."""
    config, real = judged(tmp_path, num_epochs=1), Guard.asked
    looks: list[str] = []  # where the run was whenever it noted progress
    monkeypatch.setattr(Guard, "asked", lambda guard: looks.append(guard.place) or real(guard))

    def interrupt() -> None:
        while looks.count("votes of epoch 1") < 5:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Stopped, match="SIGTERM on rank 0, stopped before reward of epoch 1"):
        train(JOB, config)
    folder = tmp_path / "00000-human-cfg_1p0"
    with Voting(config.human_port) as ann:
        with signal_inside("reduce_gradient", signal.SIGTERM), pytest.raises(Stopped):
            train(JOB, config, find_start(str(folder)))
        start = find_start(str(folder))
        assert start.checkpoint.folder.name == "epoch-0000000-step-0000001"
        train(JOB, config, start)  # the votes are in use already, so the page asks for none
    assert len(ann.kept) == PAIRS and same_end(folder, replayed(config, folder, tmp_path / "again"), 1)


def test_a_changed_learning_rate_sets_later_votes_aside(run: tuple[TrainConfig, Path], tmp_path: Path):
    """The images of epoch 3 hang on the rate in epoch 2, so votes on them are not on what is shown now. Those of epoch 2 do not."""
    config, folder = run
    copy = Path(shutil.copytree(folder, tmp_path / folder.name))
    file = copy / "votes.jsonl"
    file.write_text(file.read_text() + re.sub(r'"epoch": [01]', '"epoch": 2', file.read_text()))
    changed = dataclasses.replace(config, runs_dir=tmp_path, train=OptimConfig(learning_rate=1e-3, clip_range=0.2), num_epochs=3)
    with signal_inside("sample_share", signal.SIGTERM), pytest.raises(Stopped):
        train(JOB, changed, find_start(str(copy / "checkpoints" / "epoch-0000001")))
    assert places(copy) == places(folder)
    (aside,) = copy.glob("abandoned-*-votes.jsonl")
    assert len(read_votes(aside)) == 4 * PAIRS


def test_two_processes_and_three_people(tmp_path: Path):
    """Each pair is judged once; the adapter is that of one process with the same votes, but for rounding."""
    port = free_port()
    flags = ("--preset", "tiny", "--reward-preset", "human", "--total-pairs-per-epoch", 7, "--sample.num-solver-steps", 4,
             "--sample.batch-size", 3, "--max-batch-size", 6, "--num-epochs", 2, "--eval-prompts", 0, "--human-port", port, "--runs-dir")  # fmt: skip
    with Voting(port, "Ann") as ann, Voting(port, "Ben") as ben, Voting(port, "Cho") as cho:
        done = run_ranks(2, "train.py", *flags, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(rf"judge the pairs at +http://127.0.0.1:{port}/", done.stdout)
    folder = tmp_path / "two" / "00000-human-cfg_1p0"
    expected = [(epoch, pair, 1) for epoch in range(2) for pair in range(7)]
    assert places(folder) == sorted(ann.kept + ben.kept + cho.kept) == expected
    again = (*flags[:-3], "--votes", folder / "votes.jsonl", "--runs-dir", tmp_path / "one")
    one = train(JOB, parse_train_config([*map(str, again)])).folder
    two, one = (load_file(run / "checkpoints" / "epoch-0000002" / "adapter_model.safetensors") for run in (folder, one))
    change, difference = (
        sum((two[key] - scale * one[key]).square().sum() for key in two if "lora_B" in key).sqrt() for scale in (0, 1)
    )
    print(f"two processes: change of the adapter differs by {difference / change:.2e}")
    assert change > 0 and difference < 0.02 * change


def test_killed_between_votes(tmp_path: Path):
    """The short version of kill_votes.py, in a process that has started no threads."""
    code = (
        f"import kill_votes, pathlib, sys; sys.exit(not kill_votes.kill_and_compare(pathlib.Path({str(tmp_path)!r}), 2, seed=1))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_defaults_for_people_and_their_flags(run_cli, tmp_path: Path):
    config = parse_train_config(["--preset", "tiny", "--reward-preset", "human"])
    assert (config.total_pairs_per_epoch, config.save_freq, config.eval_every) == (64, 1, 1) and "scene" in config.eval_metrics
    assert config.train.learning_rate == 5e-4 and not config.train.forward_process
    assert parse_train_config(["--reward-specs", "human=1", "--total-pairs-per-epoch", "8"]).total_pairs_per_epoch == 8
    scored = parse_train_config(["--preset", "tiny"])
    assert scored.total_pairs_per_epoch == 128 and scored.train.forward_process
    for flags, says in (
        (["--human-port", 1], "--human-port has no effect without people who judge: add --reward-preset human"),
        (["--votes", "x"], "--votes has no effect without people who judge"),
        (["--reward-preset", "human", "--votes", "x", "--human-port", 1], "--human-port has no effect with --votes"),
        (["--reward-preset", "human", "--votes", tmp_path / "x"], "cannot be read"),
    ):
        code, _, err = run_cli("train", "--preset", "tiny", "--runs-dir", tmp_path, *flags)
        assert code == 2 and says in err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run_cli(
            "train", "--preset", "tiny", "--reward-preset", "human", "--human-port", port, "--runs-dir", tmp_path
        )
    assert code == 2 and "give another --human-port" in err and not list(tmp_path.iterdir())
