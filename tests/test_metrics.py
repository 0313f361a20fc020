"""metrics.py: numbers that do not depend on the number of processes, images on disk, several checkpoints, wrong input."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN
from PIL import Image
from ranks import run_ranks

from fdfo.config.plan import ImageSettings
from fdfo.config.presets import PRESETS
from fdfo.distributed.job import Job
from fdfo.evaluation.image_folder import find_images, read_images, save_image
from fdfo.evaluation.statistics import prompt_means, summarise
from fdfo.method.trainer import train
from fdfo.model.flow_model import FlowModel
from fdfo.model.images import draw_images, encode_for_images
from fdfo.run_folder.find_checkpoint import find_checkpoint, trained_guidance
from fdfo.storage.prompts import choose_prompts, load_prompts
from rewards.registry import build_scorers

DRAW = ("--preset", "tiny", "--prompt-set", "tiny_heldout", "--num-inference-steps", 3)
CAPTIONS = ["a red circle on a white background", "a blue ring above a green cross on a black background"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of two epochs, trained with guidance 2, each epoch saved."""
    config = dataclasses.replace(
        PRESETS["tiny-published"], sample=dataclasses.replace(PRESETS["tiny-published"].sample, num_solver_steps=3, guidance_scale=2.0),
        total_pairs_per_epoch=4, num_epochs=2, save_freq=1, eval_prompts=0, runs_dir=tmp_path_factory.mktemp("runs"),
    )  # fmt: skip
    return train(Job(0, 1, torch.device("cpu")), config).folder


def read(path: Path) -> dict:
    return json.loads(path.read_text())


# -- the same numbers at any number of processes


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """7 prompts, 2 images each, scored and saved by 1, 2 and 3 processes."""
    folder = tmp_path_factory.mktemp("processes")
    for count in (1, 2, 3):
        command = ["metrics.py", *DRAW, "--num-prompts", 7, "--num-repeats", 2, "--metrics", "scene", "scene_clip", "--per-prompt",
                   "--out", folder / f"{count}.json", "--save-images", folder / str(count), "--prompt-seed", 3]  # fmt: skip
        done = run_ranks(count, *command)
        assert done.returncode == 0, done.stderr[-3000:]
    return {count: folder / str(count) for count in (1, 2, 3)}


@pytest.mark.parametrize("count", [2, 3])
def test_pictures_do_not_depend_on_the_number_of_processes(processes: dict[int, Path], count: int):
    names = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png")) for folder in (processes[1], processes[count])]
    assert names[0] == names[1] and len(names[0]) == 14
    for name in names[0]:
        one, many = (np.asarray(Image.open(folder / name)).astype(int) for folder in (processes[1], processes[count]))
        assert np.abs(one - many).max() <= 1


@pytest.mark.parametrize("count", [2, 3])
def test_scores_do_not_depend_on_the_number_of_processes(processes: dict[int, Path], count: int):
    one, many = (read(folder.with_suffix(".json"))["results"][0] for folder in (processes[1], processes[count]))
    chosen = choose_prompts(load_prompts("tiny_heldout"), 7, 3)
    assert (
        [row["prompt"] for row in one["per_prompt"]] == [row["prompt"] for row in many["per_prompt"]] == [c.text for c in chosen]
    )
    for metric in ("scene_clip", "scene"):
        for a, b in zip(one["per_prompt"], many["per_prompt"], strict=True):
            assert len(a[metric]) == 2 and np.allclose(a[metric], b[metric], rtol=0, atol=1e-3)
        assert many["metrics"][metric]["prompts"] == 7


def test_prompts_are_the_first_of_the_shuffled_set():
    prompts = load_prompts("tiny_heldout")
    order = np.random.RandomState(5).permutation(len(prompts))
    assert [c.text for c in choose_prompts(prompts, 4, 5)] == [prompts[i] for i in order[:4]]
    assert [prompts[c.number] for c in choose_prompts(prompts, 4, 5)] == [c.text for c in choose_prompts(prompts, 4, 5)]


# -- the images are the stock pipeline's


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pictures_are_those_of_the_stock_pipeline(tiny: FlowModel, guidance: float):
    settings, seeds = ImageSettings(64, 64, 4, guidance, 2), [7, 8, 9]
    stock = tiny.pipe(
        prompt=[CAPTIONS[0], CAPTIONS[0], CAPTIONS[1]], width=64, height=64, num_inference_steps=4, guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type="pt",
        max_sequence_length=tiny.family.text_length(tiny.family.image_text),
    ).images  # fmt: skip
    text = encode_for_images(tiny, CAPTIONS)
    tiny.drop_text_encoders()
    drawn = torch.cat(list(draw_images(tiny, text, [0, 0, 1], seeds, settings)))
    assert (drawn.int() - (255 * stock).round().int()).abs().max() <= 1


def test_an_adapter_leaves_no_trace(tiny: FlowModel, run_folder: Path):
    text, settings = encode_for_images(tiny, CAPTIONS[:1]), ImageSettings(64, 64, 2, 1.0, 1)

    def draw() -> torch.Tensor:
        return torch.cat(list(draw_images(tiny, text, [0], [1], settings)))

    base = draw()
    folders = [run_folder / "checkpoints" / f"epoch-000000{epoch}" for epoch in (1, 2)]
    for folder in folders:
        tiny.load_adapter(folder)
        assert len(tiny.trainable()) == 2 * len(tiny.lora_targets)
    tiny.remove_adapter()
    assert torch.equal(draw(), base) and not tiny.trainable()


# -- several checkpoints


def test_a_run_folder_gives_a_table_and_a_plot(run_cli, run_folder: Path, tmp_path: Path):
    out = tmp_path / "m.json"
    code, text, err = run_cli("metrics", "--checkpoint", "base", run_folder, "--prompt-set", "tiny_heldout", "--num-prompts", 3,
                              "--metrics", "scene", "scene_clip", "--out", out, "--save-images", tmp_path / "pictures")  # fmt: skip
    assert code == 0, err
    results = read(out)["results"]
    assert [r["epoch"] for r in results] == [0, 1, 2] and [r["label"] for r in results][0] == "base"
    assert all(r["pictures"]["guidance"] == 2.0 and r["pictures"]["steps"] == 3 for r in results)  # the base's too
    assert results[0]["metrics"] != results[2]["metrics"]
    assert Image.open(out.with_suffix(".png")).width > 500
    table, changes = text.splitlines()[-8:-4], text.splitlines()[-4:-1]  # the last line names the plot
    assert table[0].split() == ["scene", "scene_clip"] and [line.split()[0][-7:] for line in table[1:]] == [
        "base",
        "0000001",
        "0000002",
    ]
    change = results[1]["metrics"]["scene"]["mean"] - results[0]["metrics"]["scene"]["mean"]
    assert changes[0].startswith("change from base") and f" {change:+.4f} +- " in changes[1]
    assert len(list((tmp_path / "pictures" / run_folder.name / "epoch-0000001").rglob("*.png"))) == 3


def test_json_has_all_that_makes_the_numbers_again(run_cli, run_folder: Path, tmp_path: Path):
    out, folder = tmp_path / "m.json", run_folder / "checkpoints" / "epoch-0000001"
    code, _, _ = run_cli("metrics", "--checkpoint", folder, "--prompt-set", "tiny_heldout", "--num-prompts", 3, "--metrics", "scene",
                         "own_scorers:Brightness", "--out", out)  # fmt: skip
    result = read(out)
    assert (
        code == 0 and result["config"]["num_prompts"] == 3 and set(result["versions"]) >= {"torch", "diffusers", "transformers"}
    )
    assert result["scorers"]["own_scorers:Brightness"] == "Brightness" and "per_prompt" not in result["results"][0]
    assert set(result["results"][0]["seconds"]) == {"pictures", "scene", "own_scorers:Brightness"}
    assert not out.with_suffix(".png").exists()  # one checkpoint makes no curve


def test_guidance_other_than_in_training_is_warned_about(run_cli, run_folder: Path, tmp_path: Path):
    few = ("--checkpoint", run_folder / "checkpoints" / "epoch-0000001")
    scored = (*few, "--prompt-set", "tiny_heldout", "--num-prompts", 1, "--metrics", "scene")
    assert "warning" not in run_cli("metrics", *scored)[1]
    assert "trained with guidance 2 and is sampled with 1" in run_cli("metrics", *scored, "--guidance-scale", 1)[1]
    drawn = (*few, "--prompts", CAPTIONS[0], "--out", tmp_path / "x.png", "--guidance-scale", 1)
    assert "trained with guidance 2 and is sampled with 1" in run_cli("generate", *drawn)[1]


@pytest.mark.parametrize(
    "name,guidance",
    [("fdfo-combined-reward-no-cfg", 1.0), ("fdfo-combined-reward-cfg-4.5", 4.5), ("00003-scene-cfg_2p0", 2.0), ("mine", None)],
)
def test_guidance_in_a_published_name(run_folder: Path, tmp_path: Path, name: str, guidance: float | None):
    folder = tmp_path / name / "epoch-0000001"
    shutil.copytree(run_folder / "checkpoints" / "epoch-0000001", folder)
    assert trained_guidance(find_checkpoint(str(folder))) == guidance


def test_a_published_adapter_is_drawn_with_its_guidance(run_cli, run_folder: Path, tmp_path: Path):
    """And so is the base beside it."""
    folder, out = tmp_path / "fdfo-cfg-4.5" / "epoch-0000001", tmp_path / "m.json"
    shutil.copytree(run_folder / "checkpoints" / "epoch-0000001", folder)
    scored = ("--preset", "tiny", "--prompt-set", "tiny_heldout", "--num-prompts", 1, "--metrics", "scene")
    code, text, err = run_cli("metrics", "--checkpoint", folder, "base", *scored, "--out", out)
    assert code == 0 and "warning" not in text, err
    assert [result["pictures"]["guidance"] for result in read(out)["results"]] == [4.5, 4.5]
    drawn = ("--preset", "tiny", "--prompts", CAPTIONS[0], "--grid-cols", 1, "--out", tmp_path / "x.png")
    assert "guidance 4.5" in run_cli("generate", "--checkpoint", folder, *drawn)[1]


# -- images on disk


def test_saved_pictures_score_again_alike(run_cli, processes: dict[int, Path], tmp_path: Path):
    out = tmp_path / "again.json"
    code, text, _ = run_cli("metrics", "--images", processes[1], "--prompt-set", "tiny_heldout", "--metrics", "scene", "scene_clip",
                            "--out", out, "--per-prompt")  # fmt: skip
    assert code == 0 and "14 images of 7 prompts" in text
    drawn, again = (read(path)["results"][0] for path in (processes[1].with_suffix(".json"), out))
    by_prompt = {row["prompt"]: row for row in again["per_prompt"]}
    for row in drawn["per_prompt"]:
        assert np.allclose(row["scene_clip"], by_prompt[row["prompt"]]["scene_clip"], rtol=0, atol=1e-3)
    assert math.isclose(drawn["metrics"]["scene"]["mean"], again["metrics"]["scene"]["mean"], abs_tol=1e-3)


def make_pictures(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((64, 64, 3), 20 * i, dtype=np.uint8)).save(path)
    return folder


def test_names_may_be_the_prompts(run_cli, tmp_path: Path):
    folder = make_pictures(tmp_path / "p", f"{CAPTIONS[0]}.png", f"{CAPTIONS[1]}/b.jpg", f"{CAPTIONS[1]}/a.png", "notes/none.gif")
    (folder / "read me.txt").write_text("not an image")
    entries = find_images(folder, "tiny_heldout")
    assert {entry.text: [p.name for p in entry.files] for entry in entries} == {
        CAPTIONS[0]: [f"{CAPTIONS[0]}.png"], CAPTIONS[1]: ["a.png", "b.jpg"],
    }  # fmt: skip
    assert run_cli("metrics", "--images", folder, "--metrics", "scene")[0] == 0


def test_numbers_are_the_sets(tmp_path: Path):
    folder = make_pictures(tmp_path / "p", "7.png", "000003/0.png", "000003/1.png")
    prompts = load_prompts("tiny_heldout")
    assert [(e.text, len(e.files)) for e in find_images(folder, "tiny_heldout")] == [(prompts[3], 2), (prompts[7], 1)]


def test_a_broken_picture_is_named_counted_and_left_out(run_cli, tmp_path: Path):
    folder, out = make_pictures(tmp_path / "p", "0/0.png", "0/1.png", "1/0.png", "2/0.png"), tmp_path / "m.json"
    whole = (folder / "0" / "1.png").read_bytes()
    (folder / "0" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "2" / "0.png").write_bytes(b"")
    code, text, _ = run_cli("metrics", "--images", folder, "--prompt-set", "tiny_heldout", "--metrics", "scene", "--out", out)
    result = read(out)
    assert code == 0 and "0/1.png is broken" in text and "2 broken images in all" in text
    assert [Path(name).parent.name for name in result["broken_pictures"]] == ["0", "2"]
    assert result["results"][0]["metrics"]["scene"]["prompts"] == 2 and result["results"][0]["metrics"]["scene"]["left_out"] == 1


def test_pictures_come_back_as_they_were_saved(tmp_path: Path):
    picture = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    save_image(tmp_path / "p", 4, 1, picture)
    images, counts, broken = read_images(find_images(tmp_path / "p", "tiny_heldout"))
    assert torch.equal(images[0], picture) and counts == [1] and not broken


def test_mean_is_over_prompts_and_error_over_their_means():
    summary = summarise(prompt_means([[1.0, 3.0], [5.0], [], [math.nan, 1.0]]))
    assert (summary.mean, summary.prompts, summary.left_out) == (3.5, 2, 2)
    assert math.isclose(summary.standard_error, 1.5)
    assert math.isnan(summarise([1.0]).standard_error)


# -- wrong input

METRICS = ("--metrics", "scene")
WRONG = {
    "one repeat": ([*DRAW, "--metrics", "dreamsim_diversity"], "add --num-repeats 2"),
    "metric twice": ([*DRAW, "--metrics", "scene", "scene"], "twice"),
    "own scorer": ([*DRAW, "--metrics", "nowhere:Scorer"], "cannot be imported"),
    "empty prompt file": ([*DRAW[:2], "--prompt-set", "EMPTY.txt", *METRICS], "has no prompts"),
    "foreign captions": (["--preset", "tiny", "--prompt-set", "showcase", "--num-prompts", 2, *METRICS], "does not understand"),
    "no such checkpoint": ([*DRAW, *METRICS, "--checkpoint", "base", "nowhere"], "holds no adapter"),
    "per prompt": ([*DRAW, *METRICS, "--per-prompt"], "add --out"),
    "out": ([*DRAW, *METRICS, "--out", "nowhere/m.json"], "cannot be written"),
    "out is an image": ([*DRAW, *METRICS, "--out", "m.png"], "end it with .json"),
    "empty checkpoint": ([*DRAW, *METRICS, "--checkpoint", ""], "--checkpoint is empty"),
    "no width": ([*DRAW, *METRICS, "--width", 0], "--width is 0: it should be greater than or equal to 1"),
    "scorer that ends the process": ([*DRAW, "--metrics", "broken_scorers:Scorer"], "cannot be imported (SystemExit: 0"),
    "scorer that cannot be made": ([*DRAW, "--metrics", "own_scorers:NoConstructor"], "cannot be made (TypeError"),
    "scorer that cannot score": ([*DRAW, "--metrics", "own_scorers:NoScore"], "has no method score"),
    "scorer that exits": ([*DRAW, "--metrics", "own_scorers:Exits"], "The scorer own_scorers:Exits failed twice in a row (SystemExit: 0"),
    "too many images": ([*DRAW, "--metrics", "scene", "--num-repeats", 999_999], "is more than 1,000,000 images"),
    "image folder in use": ([*DRAW, "--num-prompts", 1, *METRICS, "--save-images", "tests"], "is not empty"),
    "no image folder": (["--images", "nowhere", *METRICS], "There is no folder"),
    "no images": (["--images", "prompt_sets", *METRICS], "holds no images"),
    "mixed names": (["--images", "MIXED", *METRICS], "mixes numbers"),
    "number too large": (["--images", "FAR", "--prompt-set", "tiny_heldout", *METRICS], "ends at 511"),
    "two sizes": (["--images", "SIZES", *METRICS], "differ in size"),
    "drawing flag": (["--images", "FAR", *METRICS, "--guidance-scale", 2.0], "--guidance-scale has no effect with --images"),
    "no prompts": ([*DRAW, *METRICS, "--num-prompts", 0], "it should be greater than or equal to 1"),
}  # fmt: skip


@pytest.mark.parametrize("arguments,says", WRONG.values(), ids=WRONG.keys())
def test_wrong_input_ends_with_one_sentence(run_cli, tmp_path: Path, arguments: list, says: str):
    (tmp_path / "EMPTY.txt").write_text("\n  \n")
    make_pictures(tmp_path / "MIXED", "1.png", "a dog.png")
    make_pictures(tmp_path / "FAR", "512.png")
    make_pictures(tmp_path / "SIZES", f"{CAPTIONS[0]}.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "SIZES" / f"{CAPTIONS[1]}.png")
    here = {"EMPTY.txt", "MIXED", "FAR", "SIZES"}
    code, out, err = run_cli("metrics", *[str(tmp_path / a) if a in here else a for a in arguments])
    assert code == 2 and says in out + err


def test_mistakes_come_before_any_model_is_loaded(run_cli, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fdfo.model.images.FlowModel", fail)
    monkeypatch.setattr("rewards.scorers.clip.CLIPModel.from_pretrained", fail)
    for flags in (["--num-prompts", 513], ["--checkpoint", "nowhere"], ["--metrics", "scene_clip", "beauty"]):
        assert run_cli("metrics", *DRAW, "--metrics", "scene_clip", *flags)[0] == 2


def test_scorers_keep_to_bounded_batches(job: Job, monkeypatch: pytest.MonkeyPatch):
    """No forward sees more images than a scorer's own bound, however many are handed over."""
    scorer = build_scorers(["scene_clip"], job)["scene_clip"]
    seen, whole = [], scorer.model.get_image_features
    monkeypatch.setattr(scorer.model, "get_image_features", lambda pixels: seen.append(len(pixels)) or whole(pixels))
    scorer.score(CAPTIONS * 75, torch.zeros(150, 3, 64, 64, dtype=torch.uint8))
    assert max(seen) <= 64 and sum(seen) == 150


def test_the_readmes_own_reward_runs(tmp_path: Path):
    """The code block of README's `A reward of your own`, with its command."""
    import os
    import subprocess
    import sys

    readme = (ROOT / "README.md").read_text()
    block = readme.split("**A reward of your own**")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "my_reward.py").write_text(block)
    command = [sys.executable, ROOT / "train.py", *TINY_RUN, "--num-epochs", 1, "--reward-specs", "my_reward:Warmth=1.0"]
    assert "--reward-specs my_reward:Warmth=1.0" in readme
    done = subprocess.run(
        [*map(str, command), "--runs-dir", str(tmp_path)], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
