"""What broke under attack, in its short form; hostile.py beside it is the long one."""

import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN
from hostile import create_side_by_side
from PIL import Image
from test_heldout import JOB, evaluated
from test_training import TINY, log_of, small

from fdfo.config.command_line import parse_generate_config, parse_metrics_config, parse_train_config
from fdfo.config.errors import UserError
from fdfo.config.options import from_json
from fdfo.config.train_options import TrainConfig
from fdfo.distributed.job import Job
from fdfo.evaluation.health import check_pairs_left
from fdfo.evaluation.image_folder import read_image
from fdfo.method import trainer
from fdfo.method.prepare import prepare
from fdfo.method.trainer import train
from fdfo.report.html import write_report
from fdfo.run_folder.find_checkpoint import all_checkpoints, read_config, run_checkpoints
from fdfo.run_folder.start import FRESH, find_start
from fdfo.storage.atomic_files import own_partial, write_text
from rewards.registry import build_scorers
from rewards.scorer import checked_scores, describe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, both saved and evaluated."""
    config = evaluated(tmp_path_factory.mktemp("finished"), num_epochs=2, eval_every=1)
    return train(Job(0, 1, torch.device("cpu")), config).folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that no process has claimed."""
    return shutil.copytree(finished, tmp_path / finished.name, symlinks=True)


def go_on(run: Path, epochs: int = 3, **changes) -> Path:
    config = dataclasses.replace(read_config(run), num_epochs=epochs, runs_dir=run.parent, **changes)
    return train(JOB, config, find_start(str(run))).folder


# ---------------------------------------------------------------------------------------------------------------------
# processes side by side


def test_runs_that_start_together_have_numbers_and_folders_of_their_own(tmp_path: Path):
    right, tried = create_side_by_side(tmp_path, processes=4, times=12)
    assert right == tried == 48


def test_a_partial_name_is_of_one_process_and_goes_with_it(tmp_path: Path):
    own = own_partial(tmp_path / "a.txt")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        foreign = own.with_name(own.name.replace(str(os.getpid()), str(other.pid)))
        foreign.mkdir()
        write_text(tmp_path / "a.txt", "text")
        assert foreign.is_dir(), "another process writes there now"
        other.stdin.close()
    write_text(tmp_path / "a.txt", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_what_cannot_be_shown_does_not_end_the_run(run: Path, capsys):
    shutil.rmtree(run / "samples")
    (run / "samples").touch()
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    os.utime(run / "report.html", (0, 0))  # so that it is old enough to be written again
    assert len(log_of(go_on(run), "epoch")) == 3
    assert capsys.readouterr().out.count("cannot be written") == 3


def test_a_run_whose_folder_is_removed_ends(run: Path, monkeypatch: pytest.MonkeyPatch):
    sample = trainer.sample_share

    def removed_meanwhile(*arguments):
        shutil.rmtree(run)
        return sample(*arguments)

    monkeypatch.setattr(trainer, "sample_share", removed_meanwhile)
    with pytest.raises(UserError, match="cannot be written"):
        go_on(run, epochs=9)
    assert not run.exists()


def test_time_asleep_is_no_lack_of_progress():
    """Stopped for longer than the timeout of 1.8 s, as by Ctrl-Z, within a stage of 1 s."""
    code = (
        "import time, torch; from fdfo.distributed.job import Job; from fdfo.distributed.shutdown import guarded\n"
        "with guarded(Job(0, 1, torch.device('cpu')), 0.03): print(1, flush=True); time.sleep(1)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        assert process.wait(20) == 0


@pytest.mark.parametrize("where", ["| head -n 1", "> /dev/full 2>&1", ">&- 2>&-"])
def test_the_run_goes_on_where_nobody_can_read_what_it_says(tmp_path: Path, where: str):
    flags = " ".join(map(str, (*TINY_RUN, "--num-epochs", 1, "--runs-dir", tmp_path / "runs")))
    subprocess.run(f"({sys.executable} train.py {flags}; echo $? > {tmp_path}/code) {where}", shell=True, cwd=ROOT, timeout=120)
    (run,) = (tmp_path / "runs").iterdir()
    assert (tmp_path / "code").read_text() == "0\n" and len(log_of(run, "epoch")) == len(all_checkpoints(run)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# settings and log of a run that goes on


def test_numbers_of_train_may_change_and_are_said(run: Path, capsys):
    faster = dataclasses.replace(TINY.train, learning_rate=0.001, clip_range=0.1)
    before = read_config(run)
    go_on(run, train=faster)
    told = capsys.readouterr().out
    assert f"changed from here on: --train.learning-rate is 0.001, it was {TINY.train.learning_rate}" in told
    (kept,) = run.glob("config-until-*.json")
    assert from_json(TrainConfig, kept.read_text(), "") == before and read_config(run).train == faster
    start = log_of(run, "start")[-1]
    changed = {"train.learning_rate": [TINY.train.learning_rate, 0.001], "train.clip_range": [TINY.train.clip_range, 0.1]}
    assert start["epoch"] == 2 and start["changed"] == changed
    assert "From epoch 3 on --train.learning-rate is 0.001; it was" in write_report(run).read_text()
    go_on(run, 4)
    assert "changed" not in capsys.readouterr().out


def test_a_config_edited_by_hand_is_compared_with_the_checkpoint(run: Path, capsys):
    values = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(values | {"train": values["train"] | {"kl_weight": 0.5}}))
    go_on(run)
    assert "changed from here on: --train.kl-weight is 0.5, it was 0.0" in capsys.readouterr().out
    (run / "config.json").write_text(json.dumps(values | {"seed": 99}))
    with pytest.raises(UserError, match="--seed was 4 in the run to resume and is 99 now"):
        go_on(run, 4)


def change_line(change: Callable[[dict], object]) -> Callable[[str], str]:
    """Return an attack on the first line of an evaluation."""

    def attack(text: str) -> str:
        lines = text.splitlines()
        number = next(i for i, line in enumerate(lines) if '"kind": "eval"' in line)
        values = json.loads(lines[number])
        change(values)
        return "\n".join([*lines[:number], json.dumps(values), *lines[number + 1 :]]) + "\n"

    return attack


ATTACKS = {
    "a bit": (lambda text: text.replace(", ", "\x0c ", 1), "Line 1 of .* is damaged .it is no JSON"),
    "NULs": (lambda text: text[:300] + "\0" * 300 + text[600:], "Line 1 of .* is damaged"),
    "cut": (lambda text: text[: text.index('"kind": "epoch"')], "has no line of kind epoch for epoch 1"),
    "emptied": (lambda text: "", "has no line of kind epoch for epoch 1"),
    "an epoch": (lambda text: "".join(x for x in text.splitlines(True) if '"epoch", "epoch": 1' not in x), "no line of kind epoch for epoch 1"),
    "an evaluation": (lambda text: "".join(x for x in text.splitlines(True) if '"eval", "epoch": 0' not in x), "no line of kind eval for epoch 0"),
    "a key": (change_line(lambda line: line.update(sums=line.pop("prompt_sum"))), "Line 2 of .* is damaged .its prompt_sum is wrong or missing"),
    "a list": (change_line(lambda line: line["scores"]["reward"].pop()), "Line 2 of .* is damaged .not every score has 2 values"),
    "a score": (change_line(lambda line: line["scores"].pop("scene")), "Line 2 of .* is damaged .its scores are not those of"),
    "a number": (change_line(lambda line: line["scores"].update(scene=["a", "b"])), "Line 2 of .* is damaged .its scores is wrong"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_a_damaged_log_stops_the_resume_and_stays_as_it_is(run: Path, name: str):
    attack, says = ATTACKS[name]
    log = run / "training_log.jsonl"
    damaged = attack(log.read_text()).encode()
    log.write_bytes(damaged)
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError, match=says):
        go_on(run)
    assert log.read_bytes() == damaged and sorted(run.rglob("*")) == before


@pytest.mark.parametrize("kind", ["deleted", "a folder"])
def test_a_log_that_is_not_there_stops_the_resume(run: Path, kind: str):
    log = run / "training_log.jsonl"
    log.unlink()
    if kind == "a folder":
        log.mkdir()
    with pytest.raises(UserError, match="no line of kind epoch" if kind == "deleted" else "cannot be read"):
        go_on(run)


def test_an_unfinished_last_line_is_what_a_kill_leaves(run: Path):
    with (run / "training_log.jsonl").open("a") as file:
        file.write('{"kind": "step", "epo')
    assert len(log_of(go_on(run), "epoch")) == 3


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_a_full_disk_leaves_the_former_image(tmp_path: Path, run_cli):
    """The limit on a file's size stands for the disk's."""
    out = tmp_path / "o.jpg"
    out.write_bytes(b"former")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        code, _, err = run_cli("generate", "--preset", "tiny", "--num-inference-steps", 2, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and "o.jpg cannot be written" in err
    assert out.read_bytes() == b"former" and list(tmp_path.iterdir()) == [out]


def test_files_have_the_modes_that_the_umask_gives(tmp_path: Path):
    before = os.umask(0o027)
    try:
        folder = all_checkpoints(train(JOB, small(tmp_path)).folder)[-1]
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) > 1 and targets == sorted(targets)


def test_sixteen_bits_of_grey_become_eight(tmp_path: Path):
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.shape == (3, 64, 64) and np.abs(image[1].numpy() - grey / 257).max() <= 0.501


def test_a_checkpoint_without_training_state_is_said_to_be_left_out(run: Path, capsys):
    (run / "checkpoints" / "epoch-0000001" / "training_state.json").unlink()
    assert [folder.name for folder in run_checkpoints(run)] == ["epoch-0000002"]
    assert "epoch-0000001 is skipped: it has no training_state.json" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# adapters that break, scorers with habits


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path: Path):
    run = prepare(JOB, small(tmp_path), FRESH)
    run.model.trainable()[0].data[0, 0] = math.inf
    with pytest.raises(UserError, match="weights are not finite .* resume .* with a lower --train.learning-rate"):
        trainer.save(run)
    assert not all_checkpoints(run.folder)


def test_an_adapter_that_breaks_leaves_the_last_good_checkpoint(tmp_path: Path):
    config = small(tmp_path, save_freq=1, keep_last=1)
    run = train(JOB, config).folder
    broken = dataclasses.replace(config, num_epochs=3, train=dataclasses.replace(TINY.train, learning_rate=1e30))
    with pytest.raises(UserError, match="No pair of epoch 3 has finite images, so the adapter has broken"):
        train(JOB, broken, find_start(str(run)))
    assert [folder.name for folder in all_checkpoints(run)] == ["epoch-0000001", "epoch-0000002"]
    run = train(JOB, config).folder
    with pytest.raises(UserError, match="No held-out image is finite after epoch 1, so the adapter has broken"):
        train(JOB, evaluated(tmp_path, num_epochs=1, train=broken.train))


@pytest.mark.parametrize("name", ["Paints", "TurnsGradientsOff"])
def test_what_a_scorer_does_to_the_process_ends_with_it(tmp_path: Path, name: str):
    scorers = build_scorers(["scene", f"own_scorers:{name}"], JOB)
    images, prompts = torch.rand(4, 3, 64, 64), ["a red circle on a white background"] * 4
    before = images.clone(), [*prompts]
    checked_scores(f"own_scorers:{name}", scorers[f"own_scorers:{name}"], prompts, images)
    assert torch.equal(images, before[0]) and prompts == before[1]
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert all(isinstance(text, str) for text in describe(scorers).values())
    run = train(JOB, small(tmp_path, reward_specs=(f"own_scorers:{name}=1.0", "scene=1.0")))
    assert all(step["applied"] for step in log_of(run.folder, "step"))


def test_a_scorer_that_exits_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="own_scorers:Exits failed twice in a row .SystemExit: 0"):
        train(JOB, small(tmp_path, reward_specs=("own_scorers:Exits=1.0",)))


def test_the_scorer_or_the_adapter_is_blamed():
    everything, none = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    scores = {"a": torch.rand(4), "b": torch.full((4,), math.nan)}
    with pytest.raises(UserError, match="though there are finite images: b gives scores that are not finite; fix the scorer"):
        check_pairs_left(JOB, 3, everything, everything, scores)
    with pytest.raises(UserError, match="so the adapter has broken"):
        check_pairs_left(JOB, 3, everything, none, scores)


def test_a_metric_that_says_nothing_is_said(tmp_path: Path):
    metrics = ("own_scorers:Constant", "own_scorers:NeverAgain")
    run = train(JOB, evaluated(tmp_path, num_epochs=2, eval_metrics=metrics)).folder
    warned = [line["warnings"] for line in log_of(run, "eval")]
    assert "own_scorers:Constant gave all images the same score 7, so it says nothing" in warned[0]
    assert "own_scorers:NeverAgain gave no image a finite score" in warned[1]


# ---------------------------------------------------------------------------------------------------------------------
# flags and names


@pytest.mark.parametrize(
    "parse,flags,says",
    [
        (parse_train_config, ["--preset", "tiny", "--runs-dir", ""], "--runs-dir is empty"),
        (parse_train_config, ["--preset", "tiny", "--pretrained-model="], "--pretrained-model is empty"),
        (parse_generate_config, ["--out", "o.jpg", "--prompt-file", ""], "--prompt-file is empty"),
        (parse_generate_config, ["--out", "o.jpg", "--grid-cols", "999999999999"], "--grid-cols is 999999999999"),
        (parse_generate_config, ["--out", "o.jpg", "--grid-cols", "101", "--grid-rows", "100"], "more than 10,000 images"),
        (parse_metrics_config, ["--metrics", "scene", "--num-repeats", "99999"], "more than 1,000,000 images"),
        (parse_train_config, ["--pretrained-model", 'x"); print("a"); ("'], "--pretrained-model is"),
        (parse_train_config, ["--prompt-set", "a\n```python\nb"], "--prompt-set is"),
    ],
)
def test_flags_that_no_run_can_have(parse: Callable, flags: list[str], says: str):
    with pytest.raises(UserError, match=says):
        parse(flags)


def test_an_empty_prompt_is_a_prompt():
    assert parse_generate_config(["--out", "o.jpg", "--prompts", "", "a fox"]).prompts == ("", "a fox")
