"""Runs that are stopped by real signals and go on, to the bit, in other processes and numbers of them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN, torchrun
from ranks import run_ranks
from safetensors.torch import load_file
from signal_inside import signal_inside
from test_training import comparable, small

from fdfo.config.train_options import TrainConfig
from fdfo.distributed.job import Job
from fdfo.distributed.shutdown import Stopped, guarded
from fdfo.method.prepare import prepare
from fdfo.method.trainer import train
from fdfo.model.flow_model import FlowModel
from fdfo.run_folder.find_checkpoint import all_checkpoints, find_checkpoint
from fdfo.run_folder.start import find_start

STATE_FILES = ("adapter_model.safetensors", "training_state.safetensors")


def final_state(run: Path, epochs: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"epoch-{epochs:07d}"
    return {name: tensor for file in STATE_FILES for name, tensor in load_file(folder / file).items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs that nothing stops."""
    config = small(tmp_path_factory.mktemp("straight"), num_epochs=3, save_freq=1)
    return train(Job(0, 1, torch.device("cpu")), config).folder


def stopped(job: Job, config: TrainConfig, inside: str, number: signal.Signals, steps: int = 0) -> Path:
    """The folder of a run that is sent a signal inside a function, once one epoch and these steps of the next are logged."""
    run = config.runs_dir / "00000-scene-cfg_1p0"

    def armed() -> bool:
        if steps == 0:
            return (run / "checkpoints" / "epoch-0000001").is_dir()
        return f'"epoch": 2, "step": {steps},' in (run / "training_log.jsonl").read_text()

    with signal_inside(inside, number, armed), pytest.raises(Stopped, match=number.name):
        train(job, config)
    return run


@pytest.mark.parametrize(
    "inside,number,saved",
    [
        ("sample_share", signal.SIGTERM, "epoch-0000001"),
        ("score_share", signal.SIGUSR1, "epoch-0000001"),
        ("accumulate_gradient", signal.SIGTERM, "epoch-0000001"),
        ("reduce_gradient", signal.SIGTERM, "epoch-0000001-step-0000001"),
        ("seal", signal.SIGINT, "epoch-0000002"),
    ],
)
def test_a_signal_in_any_stage_stops_with_a_checkpoint(
    job: Job, tmp_path: Path, straight: Path, capsys, inside: str, number: signal.Signals, saved: str
):
    """In sampling, scoring, a step that is dropped, one that is finished, and the writing of a checkpoint."""
    config = small(tmp_path, num_epochs=3, save_freq=1)
    handlers = signal.getsignal(number)
    run = stopped(job, config, inside, number)
    assert signal.getsignal(number) == handlers
    assert f"--resume-from {run}" in capsys.readouterr().out
    assert find_checkpoint(str(run)).folder.name == saved
    assert train(job, config, find_start(str(run))).folder.resolve() == run.resolve()
    assert same(final_state(run, 3), final_state(straight, 3)) and comparable(run) == comparable(straight)


def test_each_step_of_an_epoch_can_be_the_last(job: Job, tmp_path: Path, straight: Path):
    """Stopped again and again within one epoch, which is sampled again each time by the adapter of its start."""
    config = small(tmp_path, num_epochs=3, save_freq=1)
    run = stopped(job, config, "reduce_gradient", signal.SIGTERM)
    again = prepare(job, config, find_start(str(run)))
    assert again.progress.epochs == 1 and again.first_epoch == 2  # the first one whose ratio at unchanged weights it can check
    again.log.close()
    for step in (2, 3):
        with signal_inside("reduce_gradient", signal.SIGTERM), pytest.raises(Stopped):
            train(job, config, find_start(str(run)))
        assert find_checkpoint(str(run)).folder.name == f"epoch-0000001-step-000000{step}"
    train(job, config, find_start(str(run)))
    assert same(final_state(run, 3), final_state(straight, 3)) and comparable(run) == comparable(straight)
    assert [folder.name for folder in all_checkpoints(run)] == [f"epoch-000000{epoch}" for epoch in (1, 2, 3)]


def test_two_processes_stop_together_and_go_on_to_the_bit(tmp_path: Path):
    done = run_ranks(2, "tests/stop_probe.py", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("stopped in") == 5 and "the same adapter and log" in done.stdout


def test_two_processes_go_on_as_one_and_then_as_three(tmp_path: Path, run_cli, monkeypatch: pytest.MonkeyPatch):
    """Two processes are asked to stop in epoch 2, one goes on to epoch 3, three to epoch 5; beside it one that was left alone."""
    flags = (*TINY_RUN, "--num-epochs", 5, "--save-freq", 2, "--runs-dir")
    own = ("--reward-specs", "tests.own_scorers:Interrupted=1.0")
    monkeypatch.setenv("STOP_RANK", "1")
    done = torchrun(2, "train.py", *flags, tmp_path, *own)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "00000-custom-cfg_1p0"
    assert f"resume with\n  torchrun --nproc_per_node=2 train.py --resume-from {run} {' '.join(own)}" in done.stdout
    assert [folder.name for folder in all_checkpoints(run)] == ["epoch-0000001"]
    monkeypatch.delenv("STOP_RANK")
    code, _, err = run_cli("train", "--resume-from", run)
    assert code == 2 and "uses code of your own: say so again with --reward-specs" in err
    done = run_ranks(1, "train.py", "--resume-from", run, *own, "--num-epochs", 3)
    assert done.returncode == 0, done.stderr[-3000:]
    done = run_ranks(3, "train.py", "--resume-from", run, *own, "--num-epochs", 5)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run_cli("train", *flags, tmp_path / "straight", *own)[0] == 0
    straight, model = final_state(tmp_path / "straight" / run.name, 5), FlowModel("tiny", "fp32", torch.device("cpu"))
    model.add_lora(32, 64, seed=6)
    start, elastic = model.adapter_state(), final_state(run, 5)
    change = sum((straight[name] - start[name]).square().sum() for name in start).sqrt()
    difference = sum((straight[name] - elastic[name]).square().sum() for name in start).sqrt() / change
    print(f"2 -> 1 -> 3 processes: change of the adapter differs by {difference:.2e}")
    assert change > 0 and difference < 0.02


def test_killed_at_random_moments_and_continued_by_auto(tmp_path: Path):
    """The short version of kill_resume.py, in a process that has started no threads."""
    code = (
        f"import kill_resume, pathlib, sys; kills, same = kill_resume.kill_and_compare(pathlib.Path({str(tmp_path)!r}), 4, seed=1); "
        "sys.exit(same != 4)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


OWN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.mark.parametrize("launcher", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")])
def test_a_closed_terminal_stops_with_a_checkpoint(tmp_path: Path, launcher: tuple[str, ...]):
    """train.py on a terminal of its own, which is closed after the first epoch; torchrun's exit code is 1."""
    ours, theirs = os.openpty()
    flags = (*TINY_RUN, "--num-epochs", 1000, "--save-freq", 1000, "--runs-dir", tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", OWN_TERMINAL, *launcher, "train.py", *map(str, flags)], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while b"epoch 1/" not in shown:
        shown += os.read(ours, 1000)
    os.close(ours)
    assert process.wait(120) == (1 if launcher else 0)
    assert find_checkpoint(str(tmp_path / "00000-scene-cfg_1p0")) is not None


def test_nohup_keeps_a_run_going(job: Job):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with guarded(job, 1.0) as guard:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not guard.asked()
    finally:
        signal.signal(signal.SIGHUP, before)
