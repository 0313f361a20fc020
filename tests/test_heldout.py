"""Evaluation during training: held-out prompts, their images and scores, signs of hacking, the best checkpoint."""

import dataclasses
import json
import math
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from ranks import run_ranks
from signal_inside import signal_inside
from test_training import comparable, log_of, small

from fdfo.config.errors import UserError
from fdfo.config.plan import ImageSettings, plan_batches
from fdfo.config.train_options import OptimConfig, SampleConfig
from fdfo.distributed.job import Job
from fdfo.distributed.shutdown import Stopped
from fdfo.evaluation.best_checkpoint import best_epoch, change, diversity_warnings, hacking_warnings
from fdfo.evaluation.heldout import prepare_held_out, split_prompts
from fdfo.evaluation.statistics import Evaluation
from fdfo.method.evaluate import EVALUATION_SEED, draw_held_out
from fdfo.method.trainer import train
from fdfo.model.flow_model import FlowModel
from fdfo.model.images import draw_images, encode_for_images
from fdfo.run_folder.find_checkpoint import all_checkpoints, find_checkpoint
from fdfo.run_folder.start import find_start
from fdfo.storage.prompts import hold_out, load_prompts
from rewards.registry import build_scorers
from rewards.scorer import Judges, WeightedReward

JOB = Job(0, 1, torch.device("cpu"))


def evaluated(folder: Path, **changes):
    """A tiny run with two held-out prompts, evaluated every second epoch."""
    return small(folder, **({"eval_prompts": 2, "eval_every": 2, "num_epochs": 5, "save_freq": 1, "seed": 4} | changes))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(JOB, evaluated(tmp_path_factory.mktemp("straight"))).folder


# ---------------------------------------------------------------------------------------------------------------------
# prompts


def test_held_out_prompts_are_never_trained_on(tmp_path: Path):
    prompts = [f"prompt {i % 50}" for i in range(80)]  # 30 of them twice
    training, held_out = hold_out(prompts, 10)
    assert len(set(held_out)) == 10 and not set(training) & set(held_out)
    assert training == [prompt for prompt in prompts if prompt not in held_out]
    assert hold_out(prompts[::-1], 10)[1] == held_out
    with pytest.raises(UserError, match="50 different prompts, too few to hold out 50: lower --eval-prompts"):
        hold_out(prompts, 50)


def test_how_many_prompts_are_held_out(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    config = small(tmp_path, prompt_set=str(file), eval_prompt_set=None, eval_prompts=None)
    for size, wanted in ((2000, 128), (300, 30), (19, 0)):
        file.write_text("\n".join(f"a red circle number {i}" for i in range(size)))
        split = split_prompts(config)
        assert (len(split.held_out), len(split.training)) == (wanted, size - wanted)
    split = split_prompts(dataclasses.replace(config, eval_prompts=5))
    assert (len(split.held_out), len(split.training)) == (5, 14)
    own = split_prompts(small(tmp_path, eval_prompts=None))  # the tiny preset names a set
    assert own.held_out == load_prompts("tiny_heldout")[:128] and own.training == load_prompts("tiny")


# ---------------------------------------------------------------------------------------------------------------------
# images


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pictures_are_those_of_the_stock_pipeline(tiny: FlowModel, tmp_path: Path, guidance: float):
    config = small(tmp_path, sample=SampleConfig(num_solver_steps=8, guidance_scale=guidance, resolution=64))
    prompts = load_prompts("tiny_heldout")[:5]
    scorers = build_scorers(["scene", "scene_clip", "pixel_diversity"], JOB)
    judges = Judges(WeightedReward({"scene": 1.0}, {"scene": scorers.pop("scene")}), scorers)
    held_out = prepare_held_out(JOB, config, tiny, prompts, judges)
    assert held_out.repeats == 2 and held_out.metrics == ("scene_clip", "pixel_diversity")
    done = []
    pictures, finite = draw_held_out(tiny, config, plan_batches(config, 1), held_out, done.append)
    settings = ImageSettings(64, 64, 8, guidance, 5)
    stock = torch.cat(
        list(draw_images(tiny, encode_for_images(tiny, prompts), range(5), [EVALUATION_SEED + i for i in range(5)], settings))
    )
    assert pictures.shape == (10, 3, 64, 64) and done == [0] and finite.all()
    assert (pictures[::2].int() - stock.int()).abs().max() <= 1
    assert (pictures[1::2].int() - stock.int()).abs().max() > 50


@pytest.mark.parametrize("processes", [2, 3])
def test_numbers_do_not_depend_on_the_number_of_processes(straight: Path, tmp_path: Path, processes: int):
    """Two prompts on three processes leave one without any."""
    done = run_ranks(
        processes, "train.py", "--preset", "tiny-published", "--total-pairs-per-epoch", 6, "--sample.num-solver-steps", 4, "--num-epochs", 2,
        "--eval-prompts", 2, "--eval-every", 2, "--seed", 4, "--runs-dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, many = log_of(straight, "eval"), log_of(tmp_path / "00000-scene-cfg_1p0", "eval")
    assert [line["epoch"] for line in many] == [0, 2]
    for a, b in zip(one, many, strict=False):
        for name in a["scores"]:
            assert len(b["scores"][name]) == 2
            torch.testing.assert_close(torch.tensor(b["scores"][name]), torch.tensor(a["scores"][name]), rtol=0, atol=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# what a run leaves


def test_a_run_evaluates_when_it_is_due(straight: Path):
    lines = log_of(straight, "eval")
    assert [line["epoch"] for line in lines] == [0, 2, 4, 5]
    for line in lines:
        assert line["prompts"] == 2 and line["repeats"] == 2 and line["held_out"] == ["scene_clip", "pixel_diversity"]
        assert list(line["scores"]) == list(line["means"]) == ["reward", "scene", "scene_clip", "pixel_diversity"]
        for name, values in line["scores"].items():
            assert len(values) == 2 and line["means"][name] == pytest.approx(sum(values) / 2)
        assert (straight / "samples" / f"epoch-{line['epoch']:07d}.jpg").stat().st_size > 1000
    names = {path.name for path in (straight / "samples").iterdir()}
    assert {name for name in names if name.startswith("pairs")} == {f"pairs-{epoch:07d}.jpg" for epoch in (2, 4, 5)}
    assert [line["best"] for line in lines] == [None, 2, 2, 5]
    best = straight / "checkpoints" / "best"
    assert best.readlink() == Path(f"epoch-{lines[-1]['best']:07d}")
    assert find_checkpoint(str(best)).folder.name == best.readlink().name


def test_evaluating_leaves_the_training_as_it_is(straight: Path, tmp_path: Path):
    plain = train(JOB, evaluated(tmp_path, eval_prompts=0)).folder
    assert [line for line in comparable(straight) if line["kind"] != "eval"] == comparable(plain)
    assert not (plain / "samples").exists() and not (plain / "checkpoints" / "best").exists()


def test_the_best_checkpoint_is_kept(tmp_path: Path):
    run = train(JOB, evaluated(tmp_path, keep_last=1, num_epochs=4)).folder
    assert [line["best"] for line in log_of(run, "eval")] == [None, 2, 2]
    assert [path.name for path in all_checkpoints(run)] == ["epoch-0000002", "epoch-0000004"]


@pytest.mark.parametrize("inside,saved", [("draw_held_out", 2), ("score_held_out", 2), ("record", 2), ("point_to_best", 2)])
def test_stopped_in_an_evaluation_and_resumed(straight: Path, tmp_path: Path, inside: str, saved: int):
    config = evaluated(tmp_path)
    run = tmp_path / straight.name
    with signal_inside(inside, signal.SIGTERM, (run / "checkpoints" / "epoch-0000002").is_dir), pytest.raises(Stopped):
        train(JOB, config)
    assert find_checkpoint(str(run)).folder.name == f"epoch-{saved:07d}"
    train(JOB, config, find_start(str(run)))
    assert comparable(run) == comparable(straight)
    assert (run / "checkpoints" / "best").readlink() == (straight / "checkpoints" / "best").readlink()


def test_a_last_evaluation_that_is_missing_is_made_up_for(straight: Path, tmp_path: Path):
    config = evaluated(tmp_path)
    run = tmp_path / straight.name
    with signal_inside("draw_held_out", signal.SIGTERM, (run / "checkpoints" / "epoch-0000005").is_dir), pytest.raises(Stopped):
        train(JOB, config)
    assert len(log_of(run, "eval")) == 3
    train(JOB, config, find_start(str(run)))
    assert comparable(run) == comparable(straight)
    with pytest.raises(UserError, match="has 5 epochs already"):
        train(JOB, config, find_start(str(run)))


def test_a_longer_run_has_no_trace_of_its_first_end(straight: Path, tmp_path: Path):
    first = train(JOB, evaluated(tmp_path, num_epochs=3)).folder
    assert [line["epoch"] for line in log_of(first, "eval")] == [0, 2, 3]
    train(JOB, evaluated(tmp_path), find_start(str(first)))
    assert comparable(first) == comparable(straight)


# ---------------------------------------------------------------------------------------------------------------------
# what evaluations say together


def of(epoch: int, **means: float) -> Evaluation:
    """Four prompts whose scores lie around these means, the same way at every epoch; the changes' standard error is 0.1."""
    wobble = [0.1 * (-1) ** (epoch // 2), 0.1 * (-1) ** epoch, -0.1 * (-1) ** (epoch // 2), -0.1 * (-1) ** epoch]
    spread = (-3.0, -1.0, 1.0, 3.0)
    return Evaluation(epoch, {name: [mean + s + w for s, w in zip(spread, wobble, strict=True)] for name, mean in means.items()})


def signs(*evaluations: Evaluation) -> list[str]:
    return hacking_warnings(evaluations, ["clip"]) + diversity_warnings(evaluations, ["diversity"], 0.7)


def test_signs_of_hacking():
    start = of(0, reward=1, clip=30, diversity=20)
    falls = [of(1, reward=2, clip=29, diversity=20), of(2, reward=3, clip=28, diversity=20)]
    (sign,) = signs(start, *falls)
    assert sign.startswith("the reward rises while clip falls, 30 -> 28 since epoch 0")
    assert not signs(start, falls[0])  # once is not enough
    assert not signs(start, falls[0], of(2, reward=3, clip=28.99, diversity=20))  # within the standard error
    assert not signs(start, falls[0], of(2, reward=1.5, clip=28, diversity=20))  # the reward falls too
    assert signs(start, of(1, reward=2, clip=31, diversity=20), *(of(e, reward=e, clip=33 - e, diversity=20) for e in (3, 4, 5)))
    assert not signs(start, *(of(e, reward=e, clip=30 + e, diversity=20 - e) for e in (1, 2, 3)))  # has a limit of its own
    (sign,) = signs(start, of(1, reward=2, clip=31, diversity=13))
    assert sign.startswith("diversity is down to 65% of epoch 0")


def test_best_checkpoint():
    start = of(0, clip=30, diversity=20)
    saved = {5, 10}
    assert best_epoch([start], ["clip"], saved) is None
    assert best_epoch([start, of(5, clip=29, diversity=20)], ["clip"], saved) is None  # the start is better
    rising = [start, of(5, clip=32, diversity=20), of(10, clip=33, diversity=16)]
    assert best_epoch(rising, ["clip"], saved) == 10 and best_epoch(rising, ["clip", "diversity"], saved) == 5
    assert best_epoch(rising, ["clip"], {5}) == 5 and best_epoch(rising, [], saved) is None


def test_prompts_without_a_score_are_left_out():
    before, after = Evaluation(0, {"m": [1.0, math.nan, 3.0]}), Evaluation(1, {"m": [2.0, 5.0, 6.0]})
    rise = change("m", before, after)
    assert (rise.before, rise.after, rise.count) == (2.0, 4.0, 2) and rise.error == pytest.approx(1.0)
    assert change("m", before, Evaluation(1, {"m": [math.nan] * 3})).count == 0


def test_a_reward_built_to_be_hacked_is_told_and_best_is_not_the_last(tmp_path: Path, run_cli, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    code, out, err = run_cli(
        "train", "--preset", "tiny-published", "--reward-specs", "own_scorers:Brightness=1", "--total-pairs-per-epoch", 24, "--sample.num-solver-steps", 4,
        "--train.learning-rate", 1e-3, "--num-epochs", 8, "--eval-every", 2, "--eval-prompts", 24, "--runs-dir", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    (run,) = tmp_path.iterdir()
    print(out)
    lines = log_of(run, "eval")
    assert any("the reward rises while scene_clip falls" in warning for line in lines for warning in line["warnings"])
    assert "warning: evaluation after epoch" in out and "look at the samples" in out
    assert lines[-1]["best"] != 8
    assert json.loads((run / "config.json").read_text())["train"]["learning_rate"] == OptimConfig(1e-3).learning_rate
