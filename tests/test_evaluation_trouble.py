"""Evaluations in trouble: scores that are not finite, checkpoints that are gone, other prompts, full disks, captions of any length."""

import dataclasses
import math
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from ranks import run_ranks
from signal_inside import signal_inside
from test_heldout import JOB, evaluated, of
from test_training import comparable, log_of

from fdfo.config.errors import UserError
from fdfo.distributed.shutdown import Stopped
from fdfo.evaluation.best_checkpoint import best_epoch
from fdfo.evaluation.heldout import split_prompts
from fdfo.method.trainer import train
from fdfo.model.flow_model import FlowModel
from fdfo.report.sheets import ShownPair, grid_sheet, pair_sheet, save_sheet
from fdfo.run_folder.find_checkpoint import all_checkpoints, find_checkpoint
from fdfo.run_folder.start import FRESH, Start, find_start

PROMPTS = [f"a {colour} circle on a white background" for colour in ("red", "green", "blue")]


def test_a_metric_without_scores_at_the_start_has_no_say():
    start, later = of(0, clip=30, other=1), of(5, clip=32, other=1)
    for values in ([math.nan] * 4, [math.nan, math.nan, math.nan, 1.0]):
        start.scores["other"] = values
        assert best_epoch([start, later], ["clip", "other"], {5}) == 5
        assert best_epoch([start, later], ["other"], {5}) is None


def test_a_picture_that_is_not_finite_has_no_score_and_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    decode = FlowModel.decode

    def one_broken(model: FlowModel, latents: torch.Tensor) -> torch.Tensor:
        images = decode(model, latents)
        if len(images) == 4:  # two held-out prompts with two images each; a training batch has more
            images[3] = math.nan
        return images

    monkeypatch.setattr(FlowModel, "decode", one_broken)
    run = train(JOB, evaluated(tmp_path, num_epochs=1)).folder
    line = log_of(run, "eval")[0]
    assert all(len(values) == 2 and values[0] is not None and values[1] is None for values in line["scores"].values())
    assert line["warnings"] == ["1 of 2 held-out prompts have no reward: an image or a score is not finite"]


# ---------------------------------------------------------------------------------------------------------------------
# prompts


def prompt_file(path: Path, prompts: list[str]) -> str:
    path.write_text("\n".join(prompts))
    return str(path)


def test_prompts_of_an_evaluation_set_are_not_trained_on(tmp_path: Path):
    every, two = prompt_file(tmp_path / "every.txt", PROMPTS), prompt_file(tmp_path / "two.txt", PROMPTS[:2])
    config = evaluated(tmp_path, prompt_set=every, eval_prompt_set=two)
    assert split_prompts(config).training == PROMPTS[2:]
    with pytest.raises(UserError, match="leaves no prompt to train on"):
        split_prompts(dataclasses.replace(config, prompt_set=two))


def test_a_single_held_out_prompt_is_refused(tmp_path: Path):
    config = evaluated(tmp_path, eval_prompt_set=prompt_file(tmp_path / "one.txt", PROMPTS[:1]), eval_prompts=None)
    with pytest.raises(UserError, match="has a single prompt: give 2 or more, or --eval-prompts 0"):
        split_prompts(config)


def test_other_held_out_prompts_are_refused_on_resume(tmp_path: Path):
    config = evaluated(tmp_path, eval_prompt_set=prompt_file(tmp_path / "set.txt", PROMPTS[:2]), num_epochs=1)
    run = train(JOB, config).folder
    prompt_file(tmp_path / "set.txt", PROMPTS[1:])
    with pytest.raises(UserError, match="are not those on which .* was evaluated after epoch 0: restore the prompt file"):
        train(JOB, dataclasses.replace(config, num_epochs=2), find_start(str(run)))


# ---------------------------------------------------------------------------------------------------------------------
# runs that go on


def test_best_is_a_checkpoint_that_is_there(tmp_path: Path):
    """The best checkpoint is gone, as --keep-last may have it where a run goes on from an earlier one or with other evaluations."""
    run = train(JOB, evaluated(tmp_path, num_epochs=4)).folder
    link = run / "checkpoints" / "best"
    assert link.readlink() == Path("epoch-0000002")
    shutil.rmtree(link.resolve())
    train(JOB, evaluated(tmp_path, num_epochs=5), find_start(str(run)))
    assert link.resolve().is_dir() and link.readlink().name == f"epoch-000000{log_of(run, 'eval')[-1]['best']}"


def test_resumed_from_best_nothing_later_is_left(tmp_path: Path):
    config = evaluated(tmp_path, num_epochs=4)
    run = train(JOB, config).folder
    best = find_start(str(run / "checkpoints" / "best"))
    with signal_inside("train_epoch", signal.SIGTERM), pytest.raises(Stopped):
        train(JOB, config, best)
    assert [line["epoch"] for line in log_of(run, "eval")] == [0, 2]
    assert all_checkpoints(run)[-1].name == (run / "checkpoints" / "best").readlink().name == "epoch-0000002"
    names = sorted(path.name for path in (run / "samples").iterdir())
    assert [name[-17:] for name in names if name.startswith("abandoned")] == ["epoch-0000004.jpg", "pairs-0000004.jpg"]
    assert names[2:] == ["epoch-0000000.jpg", "epoch-0000002.jpg", "pairs-0000002.jpg"]


def test_the_command_to_go_on_names_metrics_of_ones_own(tmp_path: Path, capsys):
    config = evaluated(tmp_path, eval_metrics=("own_scorers:Brightness", "scene_clip"))
    with signal_inside("draw_held_out", signal.SIGTERM), pytest.raises(Stopped):
        train(JOB, config)
    run = tmp_path / "00000-scene-cfg_1p0"
    assert f"--resume-from {run} --eval-metrics own_scorers:Brightness scene_clip\n" in capsys.readouterr().out


def test_strict_stops_at_a_warning_of_an_evaluation_once(tmp_path: Path):
    config = evaluated(tmp_path, strict=True, eval_least_diversity=1.0, eval_every=1)
    run, stops = tmp_path / "00000-scene-cfg_1p0", []
    for _ in range(6):
        try:
            train(JOB, config, find_start(str(run)) if stops else FRESH)
            break
        except UserError as error:
            stops.append(str(error))
            warned = log_of(run, "eval")[-1]
            assert f"--strict stops after epoch {warned['epoch']}, with a checkpoint: pixel_diversity is down" in stops[-1]
            assert find_checkpoint(str(run)).folder.name == f"epoch-000000{warned['epoch']}"
            if warned["epoch"] == config.num_epochs:
                break
    assert stops and len(stops) == len([line for line in log_of(run, "eval") if line["warnings"]])


def test_a_report_that_finds_the_disk_full_and_the_run_that_goes_on(tmp_path: Path, capsys):
    """The limit on a file's size stands for the disk's: the sheet of epoch 0 is below it, the report above."""
    config = evaluated(tmp_path / "parts", num_epochs=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        with pytest.raises(UserError, match="epoch-0000001 cannot be written .*make room"):
            train(JOB, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search("warning: .*report.html cannot be written .*make room", capsys.readouterr().out)
    (run,) = (tmp_path / "parts").iterdir()
    assert not list(run.glob(".*.partial")) and len(log_of(run, "eval")) == 1
    train(JOB, config, Start(run=run))
    straight = train(JOB, dataclasses.replace(config, runs_dir=tmp_path / "straight")).folder
    assert comparable(run) == comparable(straight)


def test_a_sheet_that_cannot_be_written_is_told_and_the_run_goes_on(tmp_path: Path):
    first = train(JOB, evaluated(tmp_path, num_epochs=1)).folder
    run = shutil.copytree(first, tmp_path / "copy", symlinks=True)  # since this process has claimed the first
    shutil.rmtree(run / "samples")
    (run / "samples").touch()
    done = run_ranks(2, "train.py", "--resume-from", run, "--num-epochs", 2)
    assert done.returncode == 0 and done.stdout.count("pairs-0000002.jpg cannot be written") == 1, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# sheets


@pytest.mark.parametrize("text", ["word " * 20_000, "x" * 100_000, "a 红色 \U0001f600 שלום e\u0301 x\x00y", ""])
def test_any_caption_fits_a_sheet(tmp_path: Path, text: str):
    pictures = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    for sheet in (grid_sheet([text, "b"], pictures, 4, 1, 1), pair_sheet([ShownPair(text, pictures, (1.0, 2.0))])):
        save_sheet(sheet, tmp_path / "sheet.jpg")
        assert Image.open(tmp_path / "sheet.jpg").height < 500


def test_rewards_that_are_not_finite_or_alike_are_neither_best_nor_worst(monkeypatch: pytest.MonkeyPatch):
    from PIL import ImageDraw

    pictures, texts = torch.zeros(2, 3, 64, 64, dtype=torch.uint8), []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, text, **style: texts.append(text))
    pair_sheet([ShownPair("", pictures, (math.nan, 1.0)), ShownPair("", pictures, (2.0, 3.0))])
    pair_sheet([ShownPair("", pictures, (4.0, 4.0))])
    assert texts == ["nan", "1 worst", "2", "3 best", "4", "4"]
