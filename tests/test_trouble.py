"""Scorers that fail in every way, ranks that die or hang, and runs that do not learn: told, and stopped where they must be."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, torchrun
from test_training import log_of, small

from fdfo.config.errors import UserError
from fdfo.config.plan import plan_batches
from fdfo.config.presets import PRESETS
from fdfo.config.train_options import SampleConfig
from fdfo.distributed.job import Job
from fdfo.distributed.launch import run_command_line
from fdfo.evaluation.health import Health, StepStats
from fdfo.method.trainer import train
from fdfo.model.images import one_colour
from fdfo.model.memory import with_largest
from fdfo.run_folder.find_checkpoint import find_checkpoint
from fdfo.run_folder.start import find_start


def scored_by(name: str) -> dict:
    return {"reward_specs": (f"own_scorers:{name}=1",)}


def test_a_score_in_a_hundred_that_is_not_finite_is_counted_and_its_pair_dropped(job: Job, tmp_path: Path, capsys):
    quick = dict(total_pairs_per_epoch=50, gradient_steps_per_epoch=1)
    run = train(job, small(tmp_path, **quick, **scored_by("SometimesNotANumber")))
    epochs = log_of(run.folder, "epoch")
    assert [epoch["dropped_pairs"] for epoch in epochs] == [1] and all(epoch["scores"] for epoch in epochs)
    assert all(p.isfinite().all() for p in run.model.trainable()) and "dropped" not in capsys.readouterr().out


def test_a_scorer_that_fails_once_is_tried_again(job: Job, tmp_path: Path, capsys):
    run = train(job, small(tmp_path, num_epochs=3, **scored_by("FailsOnce")))
    assert len(log_of(run.folder, "epoch")) == 3
    assert capsys.readouterr().err.count("FailsOnce failed (ConnectionError: the judge hung up, in own_scorers.py line ") == 1


def test_a_scorer_that_goes_on_failing_stops_the_run_by_name(job: Job, tmp_path: Path):
    config = small(tmp_path, num_epochs=3, save_freq=1, **scored_by("FailsFromThen"))
    with pytest.raises(UserError, match="The scorer own_scorers:FailsFromThen failed twice in a row .ConnectionError"):
        train(job, config)
    assert len(log_of(tmp_path / "00000-custom-cfg_1p0", "epoch")) == 1
    assert find_checkpoint(str(tmp_path / "00000-custom-cfg_1p0")).folder.name == "epoch-0000001"


def test_a_rank_that_hangs_ends_the_job_with_its_name_and_stage(tmp_path: Path):
    """By the timeout; the log and the checkpoint of the epoch before stay as they were."""
    flags = ("--num-epochs", 3, "--save-freq", 1, "--timeout-minutes", 0.1, "--runs-dir", tmp_path)
    done = torchrun(2, "train.py", *TINY_RUN, *flags, "--reward-specs", "tests.own_scorers:Hangs=1.0")
    stage = "rank 1 (in|made no progress for 0.1 minutes in) reward of epoch 2"
    assert done.returncode != 0 and re.search(stage, done.stderr), done.stderr
    run = tmp_path / "00000-custom-cfg_1p0"
    assert len(log_of(run, "epoch")) == 1 and find_checkpoint(str(run)).folder.name == "epoch-0000001"


def test_a_rank_that_dies_is_named_and_torchrun_continues_the_run(tmp_path: Path):
    """Rank 1 is killed in the second epoch that its process scores: torchrun starts the job again, which finds its own run."""
    flags = ("--num-epochs", 2, "--save-freq", 1, "--resume-from", "auto", "--runs-dir", tmp_path)
    done = torchrun(2, "train.py", *TINY_RUN, *flags, "--reward-specs", "tests.own_scorers:Dies=1.0", restarts=1)
    assert "rank 0 has lost the other processes" in done.stderr and "rank 1 in reward of epoch 2" in done.stderr
    (run,) = tmp_path.iterdir()
    assert done.returncode == 0 and len(log_of(run, "epoch")) == 2 and len(log_of(run, "start")) == 2


STEP = StepStats(0.1, 0.1, 1.0, 1.0, 2.0, 1.0, True)
GOOD = {"differing_pairs": 1.0, "dropped_pairs": 0.0, "one_colour": 0.0, "adapter_change": 1e-3}


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
        ({"grad_norm": 201.0}, "the gradient norm of step 1 is 201, the median is 2"),
        ({"ratio_mean": 3.0}, "mean ratio is 3"),
        ({"ratio_mean": math.nan}, "mean ratio is nan"),
        ({"clipfrac": 0.95}, "clipfrac is 0.95"),
        ({"ratio_first": 1.1}, "the ratio at unchanged weights is 1.1000"),
    ],
)
def test_every_sign_of_a_run_that_does_not_learn_has_its_warning(change: dict, says: str | None):
    fields = {field.name for field in dataclasses.fields(StepStats)}
    step = dataclasses.replace(STEP, **{name: value for name, value in change.items() if name in fields})
    numbers = GOOD | {name: value for name, value in change.items() if name not in fields}
    found = Health("fp32", [2.0] * 8).check(numbers, numbers["dropped_pairs"], numbers["one_colour"], [step] + [STEP] * 3)
    assert len(found) == (says is not None) and all(says in text for text in found)


def test_pictures_of_one_colour_are_seen():
    images = torch.rand(4, 3, 8, 8)
    images[1], images[2] = 0.5, torch.tensor([0.1, 0.5, 0.9])[:, None, None]
    assert one_colour(images).tolist() == [0, 1, 1, 0]


def test_strict_stops_with_a_checkpoint_and_the_warning_is_in_the_log(job: Job, tmp_path: Path, capsys):
    config = small(tmp_path, num_epochs=3, strict=True, save_freq=3, **scored_by("ConstantLater"))
    with pytest.raises(UserError, match="--strict stops after epoch 2, with a checkpoint: 0.0% of the pairs differ in reward"):
        train(job, config)
    run = tmp_path / "00000-custom-cfg_1p0"
    assert find_checkpoint(str(run)).folder.name == "epoch-0000002"
    assert [len(epoch["warnings"]) > 0 for epoch in log_of(run, "epoch")] == [False, True]
    assert "warning: epoch 2: 0.0% of the pairs differ in reward" in capsys.readouterr().out
    loose = train(job, dataclasses.replace(config, strict=False), find_start(str(run)))
    assert loose.progress.epochs == 3


def test_smaller_micro_batches_keep_the_samples_and_steps():
    config = dataclasses.replace(PRESETS["tiny-published"], sample=SampleConfig(8, 1.0, 64, batch_size=20))
    before, after = plan_batches(config, 3), plan_batches(with_largest(config, 15), 3)
    assert (after.samples, after.pairs, after.gradient_steps) == (before.samples, before.pairs, before.gradient_steps)
    assert (before.sample_batch, after.sample_batch) == (20, 15) and after.train_batch <= 15 < before.train_batch


def test_a_full_gpu_ends_with_one_sentence(capsys):
    def main() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(SystemExit, match="2"):
        run_command_line(main)
    assert capsys.readouterr().err.startswith("error: The GPU has no memory left: lower the batch size (--max-batch-size")


def test_memory_does_not_grow(job: Job, tmp_path: Path):
    sample = SampleConfig(num_solver_steps=2, resolution=64)
    config = small(tmp_path, sample=sample, total_pairs_per_epoch=2, gradient_steps_per_epoch=1, num_epochs=60, save_freq=10)
    memory = [epoch["memory_gib"] for epoch in log_of(train(job, config).folder, "epoch")]
    print(f"resident after 3, 30 and 60 epochs: {memory[2]}, {memory[29]}, {memory[59]} GiB")
    assert memory[2] > 0.1 and all(abs(later - memory[2]) < 0.01 * memory[2] for later in (memory[29], memory[59]))
