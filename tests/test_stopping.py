"""Runs that are stopped by real signals and go on, to the bit, in other processes and numbers of them."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from signal_inside import send_inside
from test_training import comparable, small

from fdfo.checkpoint import all_checkpoints, find_checkpoint
from fdfo.config import TrainConfig
from fdfo.distributed import Job
from fdfo.preemption import Stopped
from fdfo.trainer import train

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
    return train(Job(0, 1, torch.device("cpu")), config, None).folder


def stopped(job: Job, config: TrainConfig, inside: str, number: signal.Signals, steps: int = 0) -> Path:
    """The folder of a run that is sent a signal inside a function, once one epoch and these steps of the next are logged."""
    run = config.runs_dir / "00000-scene-cfg_1p0"

    def armed() -> bool:
        if steps == 0:
            return (run / "checkpoints" / "epoch-0000001").is_dir()
        log = run / "training_log.jsonl"
        return log.is_file() and f'"epoch": 2, "step": {steps}' in log.read_text()

    send_inside(inside, number, armed)
    with pytest.raises(Stopped, match=number.name):
        train(job, config, None)
    return run


@pytest.mark.parametrize(
    "inside,number,saved",
    [
        ("sample_share", signal.SIGTERM, "epoch-0000001"),
        ("score_share", signal.SIGUSR1, "epoch-0000001"),
        ("optimizer_step", signal.SIGTERM, "epoch-0000001-step-.*|epoch-0000001"),
        ("save_checkpoint", signal.SIGINT, "epoch-0000002"),
    ],
)
def test_a_signal_in_any_stage_stops_with_a_checkpoint(
    job: Job, tmp_path: Path, straight: Path, capsys, inside: str, number: signal.Signals, saved: str
):
    config = small(tmp_path, num_epochs=3, save_freq=1)
    handlers = signal.getsignal(number)
    run = stopped(job, config, inside, number)
    assert signal.getsignal(number) == handlers
    assert f"--resume-from {run}" in capsys.readouterr().out
    newest = find_checkpoint(str(run)).folder.name
    assert newest == saved or inside == "optimizer_step" and newest.startswith("epoch-0000001")
    assert train(job, config, find_checkpoint(str(run))).folder.resolve() == run.resolve()
    assert same(final_state(run, 3), final_state(straight, 3)) and comparable(run) == comparable(straight)


def test_each_step_of_an_epoch_can_be_the_last(job: Job, tmp_path: Path, straight: Path):
    """Stopped again and again within one epoch, which is sampled again each time by the adapter of its start."""
    config = small(tmp_path, num_epochs=3, save_freq=1)
    run = stopped(job, config, "optimizer_step", signal.SIGTERM)
    for _ in range(2):
        send_inside("update", signal.SIGTERM, armed=lambda: True)
        with pytest.raises(Stopped):
            train(job, config, find_checkpoint(str(run)))
    train(job, config, find_checkpoint(str(run)))
    assert same(final_state(run, 3), final_state(straight, 3)) and comparable(run) == comparable(straight)
    assert [folder.name for folder in all_checkpoints(run)] == [f"epoch-000000{epoch}" for epoch in (1, 2, 3)]
