"""--reward-scale std: running spreads, scorers of unlike scales that pull equally, and an exact resume."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_training import comparable, log_of, small

from fdfo.distributed.job import Job
from fdfo.method.trainer import train
from fdfo.run_folder.start import find_start
from rewards.spread import EPOCHS, Spread

ONE, THOUSAND = "tests.own_scorers:Redness=1", "tests.own_scorers:RednessInThousandths=1"


def test_the_spread_runs_over_the_last_epochs():
    spread = Spread().after({"a": [1.0, 3.0, 0.0, 4.0, math.nan, 1.0], "b": [5.0, 5.0] * 3, "c": [math.inf, 1.0] * 3})
    assert spread.of("a") == pytest.approx(math.sqrt((1 + 4) / 2)) and spread.of("b") == spread.of("c") == 0
    assert spread.divide({"a": 2.0, "b": 3.0, "c": 4.0}) == {"a": 2.0 / spread.of("a"), "b": 3.0, "c": 4.0}
    assert spread.after({"a": [0.0, 6.0]}).squares["a"] == pytest.approx((2.5 + 9) / 2)
    for _ in range(EPOCHS * 10):
        spread = spread.after({"a": [0.0, 2.0]})
    assert spread.of("a") == pytest.approx(1, abs=1e-3)
    assert Spread(**json.loads(json.dumps(dataclasses.asdict(spread)))) == spread


def adapter(run, epoch: int = 2) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "checkpoints" / f"epoch-000000{epoch}" / "adapter_model.safetensors")


def apart(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """How far two adapters are from each other, relative to the change of the first."""
    moved = [name for name in one if "lora_B" in name]  # they start at 0
    change = sum(one[name].square().sum() for name in moved)
    return float((sum((one[name] - two[name]).square().sum() for name in moved) / change).sqrt())


def test_scorers_of_unlike_scales_pull_equally_and_resume_to_the_bit(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A scorer times 1000 changes nothing beside another one; without the flag it does. A run in two parts is that in one."""
    monkeypatch.syspath_prepend(ROOT)
    scaled = small(tmp_path / "scaled", reward_specs=("scene_clip=1", THOUSAND), reward_scale="std", num_epochs=2, save_freq=1)
    run = train(job, scaled)
    alike = train(job, dataclasses.replace(scaled, runs_dir=tmp_path / "alike", reward_specs=("scene_clip=1", ONE)))
    off = train(job, dataclasses.replace(scaled, runs_dir=tmp_path / "off", reward_scale="off", num_epochs=1))
    print(f"times 1000: {apart(adapter(run), adapter(alike)):.1e} of the change")
    assert apart(adapter(run), adapter(alike)) < 1e-2 < 0.1 < apart(adapter(run, 1), adapter(off, 1))
    spreads = [line["spread"] for line in log_of(run.folder, "epoch")]
    assert spreads[0]["scene_clip"] > 0 and spreads[0] != spreads[1]
    for line, other in zip(spreads, log_of(alike.folder, "epoch"), strict=True):
        assert line[THOUSAND[:-2]] == pytest.approx(1000 * other["spread"][ONE[:-2]], rel=0.02)

    parts = dataclasses.replace(scaled, runs_dir=tmp_path / "parts")
    first = train(job, dataclasses.replace(parts, num_epochs=1))
    second = train(job, parts, find_start(str(first.folder)))
    one, two = adapter(run), adapter(second)
    assert all(torch.equal(one[name], two[name]) for name in one) and comparable(run.folder) == comparable(second.folder)
