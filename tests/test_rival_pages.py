"""benchmarks/rivals/: the tuning, and the pages that are written from its logs."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from fdfo.config.command_line import parse, parse_train_config
from fdfo.config.errors import UserError
from fdfo.config.options import to_json
from fdfo.config.presets import PRESETS
from fdfo.run_folder.find_checkpoint import CONFIG
from fdfo.run_folder.log import LOG

sys.path[:0] = [str(ROOT / "benchmarks" / "rivals"), str(ROOT / "benchmarks")]

import long_runs  # noqa: E402
import rival_page  # noqa: E402
import tune  # noqa: E402
import variants_page  # noqa: E402
from common import tiny_config  # noqa: E402
from diffusion_nft import NftOptions  # noqa: E402
from fdfo_variants import VariantOptions  # noqa: E402
from flow_grpo import FlowGrpoOptions  # noqa: E402
from pages import MARK, write_page  # noqa: E402
from run_logs import END, gpu_of  # noqa: E402


def fake_run(folder: Path, epochs: int, scene: float, seed: int) -> None:
    """A run's kept log, whose scores rise to `scene`; scene_clip rises by 10, with a spread of 1.41 over two captions."""
    folder.mkdir(parents=True)
    config = dataclasses.replace(PRESETS["tiny-published"], num_epochs=epochs, seed=seed)
    (folder / CONFIG).write_text(to_json(config))
    (folder / END).write_text('{"wall": 1.0, "broke": "", "machine": "a test"}')
    lines = []
    for epoch in range(0, epochs + 1, 10):
        means = {"scene": 70 + (scene - 70) * epoch / epochs, "scene_clip": 50 + 10 * epoch / epochs, "pixel_diversity": 18.0}
        scores = {name: [value - 1, value + 1] for name, value in means.items()}
        numbers = {"means": means, "scores": scores, "held_out": ["scene_clip", "pixel_diversity"]}
        lines.append({"kind": "eval", "epoch": epoch, "prompts": 2, **numbers})
    (folder / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_is_written_by_hand_above_the_mark_stays(tmp_path: Path):
    page = tmp_path / "page.md"
    write_page(page, "Title", ["old"])
    page.write_text(page.read_text().replace("# Title\n", "# Title\n\nOur findings.\n"))
    write_page(page, "Title", ["new", ""])
    assert page.read_text() == f"# Title\n\nOur findings.\n\n{MARK}\n\nnew\n"


def test_the_flags_of_all_settings_exist():
    for method, read in (("flow_grpo", FlowGrpoOptions), ("diffusion_nft", NftOptions), ("fdfo_variants", VariantOptions)):
        for flags in tune.SETTINGS[method].values():
            tiny_config(parse(read, flags.split()), method)
    for flags in tune.SETTINGS["fdfo"].values():
        parse_train_config(["--preset", "tiny-published", *flags.split()])


def test_the_best_setting_goes_into_the_final_and_the_page_shows_it(tmp_path: Path):
    logs, best = tmp_path / "logs", {"fdfo": "clip-0.1", "flow_grpo": "noise-1.0", "diffusion_nft": "defaults"}
    for method, settings in ((method, tune.SETTINGS[method]) for method in tune.METHODS):
        assert len(settings) == 8
        for setting in settings:
            fake_run(logs / "tuning" / method / f"{setting}-seed-6", 100, 90 if setting == best[method] else 80, 6)
    config = tune.TuneConfig(logs, final=True)
    planned = tune.planned_runs(config)
    assert [(one.method, one.setting, one.seed) for one in planned[:3]] == [(*pair, 7) for pair in best.items()]
    assert len(planned) == 9 and not tune.planned_runs(dataclasses.replace(config, final=False))
    assert len(tune.planned_runs(dataclasses.replace(config, final=False, tuning_epochs=150))) == 24  # those there are shorter
    for one in planned:
        fake_run(one.kept, one.epochs, {"fdfo": 95.0, "flow_grpo": 85.0, "diffusion_nft": 98.0}[one.method], one.seed)
    assert not tune.planned_runs(config)
    rival_page.main(rival_page.PageConfig(logs, tmp_path / "rivals.md"))
    page = (tmp_path / "rivals.md").read_text()
    assert "Flow-GRPO's best mean over its seeds is 85.0, within 200 epochs." in page
    assert (
        "Epochs at which the runs of FDFO reach it: 120, 120, 120." in page
        and "Epochs at which the runs of FDFO reach it: never, never, never." in page
    )
    assert "**noise-1.0**" in page and (tmp_path / "rivals.png").exists()
    fake_run(logs / "final" / "fdfo" / "defaults-seed-7", 200, 90.0, 7)
    rival_page.main(rival_page.PageConfig(logs, tmp_path / "rivals.md"))
    page = (tmp_path / "rivals.md").read_text()
    assert "FDFO (clip-0.1) reach it: 120, 120, 120." in page and "FDFO (defaults) reach it: 150." in page
    (logs / "tuning" / "fdfo" / "defaults-seed-6" / END).unlink()
    with pytest.raises(UserError, match="The tuning of fdfo lacks defaults"):
        tune.planned_runs(config)


def test_the_page_on_variants_sorts_the_settings_and_the_final_takes_those_named(tmp_path: Path):
    logs, page = tmp_path / "logs", tmp_path / "gap.md"
    config = tune.TuneConfig(logs, ("fdfo_variants",), only=("defaults", "clip-0.5"))
    with pytest.raises(UserError, match="fdfo_variants has no setting noise-1.0"):
        tune.planned_runs(dataclasses.replace(config, only=("noise-1.0",)))
    for one in tune.planned_runs(config):
        fake_run(one.kept, one.epochs, {"defaults": 90.0, "clip-0.5": 94.0}[one.setting], one.seed)
    fake_run(logs / "tuning" / "diffusion_nft" / "group-16-seed-6", 100, 98, 6)
    final = dataclasses.replace(config, final=True)
    assert [(one.setting, one.seed) for one in tune.planned_runs(final)[:3]] == [
        ("defaults", 7),
        ("clip-0.5", 7),
        ("defaults", 8),
    ]
    for one in tune.planned_runs(final):
        fake_run(one.kept, one.epochs, 80.0 + one.seed, one.seed)
    variants_page.main(variants_page.PageConfig(logs, page))
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:5]] == ["| clip-0.5", "| **defaults**", "| DiffusionNFT, group-16"]
    assert rows[2].split(" | ")[5:10] == ["94.0", "83.20", "100", "0.71", "3.54"] and rows[3].split(" | ")[7] == "-"
    assert rows[7].split(" | ")[6] == "88.0 (87.0, 88.0, 89.0)" and (tmp_path / "gap.png").exists()


def test_the_page_on_long_runs(tmp_path: Path):
    kept, warning = tmp_path / "logs" / "defaults-6", "a step's clipfrac is 0.{}: lower --train.learning-rate"
    fake_run(kept, 200, 90.0, 6)
    lines = [json.loads(line) | {"best": 50, "warnings": []} for line in (kept / LOG).open()]
    for epoch in range(1, 201):
        warnings = [warning.format(epoch)] if epoch in (93, 95) else []
        lines.append(
            {"kind": "epoch", "epoch": epoch, "reward_mean": float(epoch), "skipped_steps": epoch % 2, "warnings": warnings}
        )
    (kept / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    long_runs.main(long_runs.LongConfig(tmp_path / "logs", tmp_path / "long.md"))
    page = (tmp_path / "long.md").read_text()
    assert "| training reward | - | 45.5 | 95.5 | 195.5 |" in page and "| scene | 70.0 | 75.0 | 80.0 | 90.0 |" in page
    assert "checkpoints/best: epoch 50, with a mean rise of 0.88 spreads; scene 75.0 (last 90.0)" in page
    assert "skipped optimizer steps: 100" in page and page.count("- warned") == 1
    assert "- warned after epoch 93, 2 time(s) in all: a step's clipfrac is 0.93" in page


def test_runs_are_dealt_to_the_gpus_that_are_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpu_of(3) == {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [gpu_of(number)["CUDA_VISIBLE_DEVICES"] for number in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert gpu_of(1) == {"CUDA_VISIBLE_DEVICES": "6"}
