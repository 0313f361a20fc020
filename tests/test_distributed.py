"""1, 2 and 3 processes: the same prompts, noise and gradient, and the same adapter up to rounding."""

from pathlib import Path

import pytest
import torch
from conftest import torchrun
from ranks import run_ranks

PAIRS = 20  # not divisible by 3


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    folder, results = tmp_path_factory.mktemp("probes"), {}
    for processes in (1, 2, 3):
        out = folder / f"{processes}.pt"
        done = run_ranks(processes, "tests/distributed_probe.py", out, folder / f"runs{processes}", PAIRS)
        assert done.returncode == 0, done.stderr[-3000:]
        results[processes] = torch.load(out, weights_only=True)
    return results


def joined(probe: dict, name: str) -> list:
    return [row for part in probe["parts"] for row in part[name]]


@pytest.mark.parametrize("processes", [2, 3])
def test_prompts_and_noise_are_the_same_to_the_bit(probes: dict, processes: int):
    one, many = probes[1], probes[processes]
    assert joined(one, "prompts") == joined(many, "prompts") and len(joined(many, "prompts")) == PAIRS
    assert torch.equal(torch.stack(joined(one, "gammas")), torch.stack(joined(many, "gammas")))
    for mine, theirs in zip(joined(one, "noise"), joined(many, "noise"), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("processes", [2, 3])
def test_first_gradient_is_the_same(probes: dict, processes: int):
    one, many = probes[1]["gradient"], probes[processes]["gradient"]
    assert one.norm() > 0
    assert (one - many).norm() / one.norm() < 1e-4


@pytest.mark.parametrize("processes", [2, 3])
def test_adapter_after_two_epochs_is_the_same(probes: dict, processes: int):
    one, many = probes[1], probes[processes]
    assert torch.equal(one["start"], many["start"])
    change = (one["end"] - one["start"]).norm()
    difference = ((one["end"] - many["end"]).norm() / change).item()
    print(f"{processes} processes: change of the adapter differs by {difference:.2e}")
    assert change > 0 and difference < 0.02


@pytest.mark.parametrize("processes", [2, 3])
def test_no_rank_holds_more_than_its_share(probes: dict, processes: int):
    whole = probes[1]["parts"][0]["held"]
    share = -(-PAIRS // processes) / PAIRS
    assert all(part["held"] <= whole * share + 1e-9 for part in probes[processes]["parts"])


def test_a_mistake_under_torchrun_is_told_once(tmp_path: Path):
    done = torchrun(2, "train.py", "--preset", "tiny", "--prompt-set", "nowhere", "--runs-dir", tmp_path)
    assert done.returncode != 0 and "exitcode  : 2" in done.stderr
    assert done.stderr.count("error: There is no prompt set 'nowhere'") == 1
    assert "Traceback (most recent call last)" not in done.stderr.split("error: There is")[0]
    assert not list(tmp_path.iterdir())
