"""Checkpoints that were damaged on the disk, could not be written, are deleted, or are found by --resume-from auto."""

import dataclasses
import json
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_stopping import final_state, same, stopped
from test_training import small

from fdfo.config.errors import UserError
from fdfo.distributed.job import Job
from fdfo.method.trainer import train
from fdfo.run_folder.find_checkpoint import Checkpoint, all_checkpoints, find_checkpoint
from fdfo.run_folder.start import FRESH, Start, find_auto_start, find_start
from fdfo.storage.atomic_files import json_hash

JOB = Job(0, 1, torch.device("cpu"))
FILES = (
    "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors", "README.md",
    "training_state.json", "training_state.safetensors",
)  # fmt: skip
INSIDE_EPOCH = (*FILES, "epoch_start.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two finished runs of three epochs that differ in the seed."""
    return [train(JOB, small(tmp_path_factory.mktemp("runs"), num_epochs=3, save_freq=1, seed=seed)).folder for seed in (6, 7)]


@pytest.fixture(scope="module")
def inside_epoch(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs whose newest checkpoint lies inside an epoch."""
    configs = [small(tmp_path_factory.mktemp("stopped"), num_epochs=3, save_freq=1, seed=seed) for seed in (6, 7)]
    return [stopped(JOB, config, "reduce_gradient", signal.SIGTERM, steps=1) for config in configs]


class Attack:
    """What a pickle can do to who loads it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def damage(file: Path, how: str, other: Path, mark: Path) -> None:
    content = file.read_bytes()
    if how == "swapped":
        content = other.read_bytes()
    elif how == "pickle":
        content = pickle.dumps(Attack(mark))
    elif how == "bit":
        middle = len(content) // 2
        content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    else:
        content = content[: len(content) // 2 if how == "truncated" else 0]
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "emptied", "bit", "swapped", "pickle"])
@pytest.mark.parametrize("kind", ["whole epochs", "inside an epoch"])
def test_a_damaged_file_is_refused_by_name_and_passed_over(
    request: pytest.FixtureRequest, tmp_path: Path, capsys, kind: str, how: str
):
    """Every file of a checkpoint, damaged in every way; a run folder falls back to the checkpoint before."""
    originals = request.getfixturevalue("runs" if kind == "whole epochs" else "inside_epoch")
    newest, other = (all_checkpoints(run)[-1] for run in originals)
    files = FILES if kind == "whole epochs" else INSIDE_EPOCH
    assert {path.name for path in newest.iterdir()} == set(files)
    for file in files:
        run, mark = tmp_path / file / "run", tmp_path / file / "mark"
        shutil.copytree(originals[0], run)
        folder = run / "checkpoints" / newest.name
        same_bytes = (folder / file).read_bytes() == (other / file).read_bytes()
        damage(folder / file, how, other / file, mark)
        if how == "swapped" and same_bytes:  # the adapter's settings are those of any run
            continue
        named = f"{folder}/.* is damaged or foreign" if how == "swapped" else f"{folder}/{file} is damaged or foreign"
        with pytest.raises(UserError, match=named):
            find_checkpoint(str(folder))
        assert find_checkpoint(str(run)).folder == all_checkpoints(run)[-2]
        assert f"{newest.name} is skipped" in capsys.readouterr().out and not mark.exists()


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(runs: list[Path], tmp_path: Path):
    run = tmp_path / runs[0].name
    shutil.copytree(runs[0], run)
    damage(run / "checkpoints" / "epoch-0000003" / "adapter_model.safetensors", "bit", Path(), Path())
    config = small(tmp_path, num_epochs=3, save_freq=1)
    train(JOB, config, find_start(str(run)))
    assert same(final_state(run, 3), final_state(runs[0], 3))
    assert len(list((run / "checkpoints").glob("abandoned-*-epoch-0000003"))) == 1


def test_a_missing_file_and_a_state_without_sums_are_refused(runs: list[Path], tmp_path: Path):
    """The second is what earlier versions wrote; its two adapter files alone are an adapter like any other."""
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    folder = run / "checkpoints" / "epoch-0000003"
    (folder / "training_state.safetensors").unlink()
    with pytest.raises(UserError, match="training_state.safetensors is damaged or foreign"):
        find_checkpoint(str(folder))
    (folder / "training_state.json").write_text('{"epoch": 3, "samples": 1, "loss_scale": {}}')
    with pytest.raises(UserError, match="no checksums, like those of early versions"):
        find_checkpoint(str(folder))
    (folder / "training_state.json").unlink()
    assert not find_checkpoint(str(folder)).resumable


def test_a_whole_checkpoint_of_another_run_is_refused(runs: list[Path], tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(runs[1] / "checkpoints", run / "checkpoints")
    with pytest.raises(UserError, match="--seed was 7 in the run to resume and is 6 now"):
        train(JOB, small(tmp_path, num_epochs=4), find_start(str(run)))


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1},
        {"epoch": "x"},
        {"steps": [{"loss": 1}]},
        {"steps": 3},
        {"loss_scale": None},
        {"samples": None},
        {"epoch": 2},
    ],
)
def test_a_sealed_state_with_nonsense_is_refused(runs: list[Path], tmp_path: Path, change: dict):
    """Whoever wrote the sums: the values must be those of a run, too."""
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    path = run / "checkpoints" / "epoch-0000003" / "training_state.json"
    content = json.loads(path.read_text())
    content["state"] |= change
    del content["sha256"]
    path.write_text(json.dumps(content | {"sha256": json_hash(content)}))
    with pytest.raises(UserError, match="damaged"):
        train(JOB, small(tmp_path, num_epochs=4), find_start(str(path.parent)))


def test_old_checkpoints_are_deleted_as_asked(tmp_path: Path):
    config = small(tmp_path, num_epochs=6, save_freq=1, keep_last=2, keep_every=3, gradient_steps_per_epoch=1)
    run = train(JOB, config).folder
    assert [folder.name for folder in all_checkpoints(run)] == [f"epoch-000000{epoch}" for epoch in (3, 4, 5, 6)]
    assert len(list((run / "checkpoints").iterdir())) == 4  # the fourth stays, since nothing was drawn with the sixth yet


def test_a_full_disk_ends_with_one_sentence_and_the_last_checkpoint_intact(tmp_path: Path):
    """The limit on a file's size stands for the disk's: writing fails in the midst of the adapter."""
    config = small(tmp_path, save_freq=1)
    run = train(JOB, config).folder
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(UserError, match="epoch-0000002 cannot be written .*make room, then resume"):
            train(JOB, dataclasses.replace(config, num_epochs=3), find_start(str(run)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["epoch-0000001"]
    train(JOB, dataclasses.replace(config, num_epochs=3), find_start(str(run)))


def test_auto_finds_its_own_run(runs: list[Path], tmp_path: Path, capsys):
    config = dataclasses.replace(small(tmp_path, num_epochs=3, save_freq=1), resume_from="auto")
    assert find_auto_start(config) == FRESH
    for number in (0, 1):
        shutil.copytree(runs[0], tmp_path / f"0000{number}-scene-cfg_1p0")
    shutil.copytree(runs[1], tmp_path / "00002-scene-cfg_1p0")
    (tmp_path / "00003-scene-cfg_1p0").mkdir()
    own = tmp_path / "00001-scene-cfg_1p0"
    found = [
        find_auto_start(dataclasses.replace(config, **change))
        for change in ({}, {"num_epochs": 9, "keep_last": 1}, {"lora_rank": 8})
    ]
    whole = Start(Checkpoint(own / "checkpoints" / "epoch-0000003", own), own)
    assert found == [whole, whole, FRESH]
    faster = dataclasses.replace(config.train, learning_rate=1e-3)
    capsys.readouterr()
    assert find_auto_start(dataclasses.replace(config, train=faster)) == FRESH
    told = capsys.readouterr().out
    assert "00003-scene-cfg_1p0 is skipped" in told and "so a new one begins (00002-scene-cfg_1p0 differs in " in told
    shutil.rmtree(own / "checkpoints")
    assert find_auto_start(config) == Start(run=own)
    assert same(final_state(train(JOB, config, Start(run=own)).folder, 3), final_state(runs[0], 3))


def test_two_processes_do_not_train_in_one_folder(runs: list[Path], tmp_path: Path):
    run = tmp_path / runs[0].name
    shutil.copytree(runs[0], run)
    hold = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(1, flush=True); sys.stdin.read()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", hold, run / ".claim"], **pipes) as other:
        other.stdout.readline()
        before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
        with pytest.raises(UserError, match="another process may be training in it"):
            train(JOB, small(tmp_path, num_epochs=4), find_start(str(run)))
        assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before
        other.stdin.close()
    assert train(JOB, small(tmp_path, num_epochs=4), find_start(str(run))).progress.epochs == 4
