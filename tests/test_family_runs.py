"""Whole runs of the families beside SD3, on small random models: resume, processes, evaluation, export, generate.py, metrics.py."""

import dataclasses
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import CPU, FAMILIES
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from ranks import run_ranks
from test_training import comparable, log_of, small

from fdfo.config.errors import UserError
from fdfo.config.plan import ImageSettings
from fdfo.config.presets import PRESETS
from fdfo.config.train_options import KLEIN_4B, KLEIN_9B, SD35_LARGE, Z_IMAGE, OptimConfig, SampleConfig, TrainConfig
from fdfo.distributed.job import Job
from fdfo.method.trainer import train
from fdfo.model.families.base import even_levels
from fdfo.model.families.flux2_klein import Flux2Klein
from fdfo.model.families.sd3 import StableDiffusion3
from fdfo.model.families.z_image import ZImage
from fdfo.model.flow_model import FlowModel
from fdfo.model.images import draw_images, encode_for_images
from fdfo.run_folder.find_checkpoint import CARD
from fdfo.run_folder.model_card import Origin, model_card
from fdfo.run_folder.start import find_start, with_lora_of
from fdfo.storage.hub import LORA_FILE

NEW = ("klein", "z_image")
LITTLE = dict(gradient_checkpointing=True, offload_scorers=True, offload_trajectories=True)
SETTINGS = ImageSettings(width=64, height=64, steps=3, guidance=2.0, batch_size=4)
PROMPTS = ["a red ring", "a blue ring above a green cross on a black background"]


def quick(folder: Path, model: str, **changes) -> TrainConfig:
    """A run of a second with guidance 2, whose rate moves the adapter far; evaluated on two prompts."""
    settings = dict(
        pretrained_model=model, sample=SampleConfig(3, 2.0, 64), train=OptimConfig(learning_rate=5e-3, clip_range=0.2), num_epochs=2,
        save_freq=1, eval_every=1, total_pairs_per_epoch=4, max_batch_size=4, reward_specs=("own_scorers:Brightness=1.0",),
        eval_prompts=2, eval_metrics=("pixel_diversity",), lora_rank=4, lora_alpha=8,
    )  # fmt: skip
    return small(folder, **(settings | changes))


def few(folder: Path, model: str) -> TrainConfig:
    """On a subset of the samples, with the KL term. Two processes have shares of unlike sizes, and one alone has held-out prompts."""
    subset = OptimConfig(learning_rate=1e-3, clip_range=0.2, steps_per_trajectory=2, branches="one", kl_weight=0.1)
    return quick(
        folder, model, train=subset, num_epochs=1, total_pairs_per_epoch=5, max_batch_size=2, eval_prompts=3, eval_metrics=()
    )


@pytest.fixture(scope="module")
def runs(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each family."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: train(Job(0, 1, CPU), quick(folder, bases[name])).folder for name in NEW}


def drawn(model: FlowModel) -> torch.Tensor:
    """Two images [2, 3, 64, 64] as generate.py draws them."""
    return torch.cat(list(draw_images(model, encode_for_images(model, PROMPTS), [0, 1], [3, 4], SETTINGS))).int()


def drawn_by_diffusers(pipe: diffusers.DiffusionPipeline, offset: float) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        prompt=list(PROMPTS), guidance_scale=2.0 + offset, num_inference_steps=3, height=64, width=64, max_sequence_length=112,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)], output_type="pt", sigmas=even_levels(3),
    ).images  # fmt: skip
    return (255 * images).round().int()


@pytest.mark.parametrize("name", NEW)
def test_peft_and_diffusers_draw_the_same_pictures(
    bases: dict[str, str], runs: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_cli
):
    """By FDFO, by PEFT alone, by the pipeline's own load_lora_weights, and merged into a pipeline."""
    monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)
    checkpoint, model = runs[name] / "checkpoints" / "epoch-0000002", FlowModel(bases[name], "fp32", CPU)
    kind, offset = model.family.pipeline, model.family.guidance_offset
    base = drawn(model)
    model.load_adapter(checkpoint)
    expected = drawn(model)
    assert (expected - base).abs().float().mean() > 0.5

    def stock(folder: str | Path) -> diffusers.DiffusionPipeline:
        return kind.from_pretrained(str(folder), torch_dtype=torch.float32)

    by_peft, by_diffusers = stock(bases[name]), stock(bases[name])
    PeftModel.from_pretrained(by_peft.transformer, checkpoint)
    by_diffusers.load_lora_weights(str(checkpoint), weight_name=LORA_FILE)
    assert run_cli("fdfo.export.__main__", runs[name], "--merge", tmp_path / "merged")[0] == 0
    for pipe in (by_peft, by_diffusers, stock(tmp_path / "merged")):
        assert (drawn_by_diffusers(pipe, offset) - expected).abs().max() <= 2
    merged = FlowModel(str(tmp_path / "merged"), "fp32", CPU)
    assert type(merged.family) is type(model.family) and (drawn(merged) - expected).abs().max() <= 2


@pytest.mark.parametrize("name", NEW)
def test_the_small_memory_way_and_a_resume_change_no_bit(bases: dict[str, str], runs: dict[str, Path], name: str, tmp_path: Path):
    """The second epoch is done after a resume, with gradient checkpointing, and scorers and trajectories on the host."""
    first = train(Job(0, 1, CPU), quick(tmp_path, bases[name], num_epochs=1)).folder
    train(Job(0, 1, CPU), quick(tmp_path, bases[name], **LITTLE), find_start(str(first)))
    assert comparable(first) == comparable(runs[name])
    evaluations = log_of(first, "eval")
    assert [line["epoch"] for line in evaluations] == [0, 1, 2] and "pixel_diversity" in evaluations[-1]["scores"]
    assert (first / "report.html").is_file() or list((first / "samples").iterdir())
    assert all(step["applied"] for step in log_of(first, "step"))
    assert all(line["ratio_first"] == pytest.approx(1, abs=1e-3) for line in log_of(first, "step")[:1])


@pytest.mark.gpu
@pytest.mark.parametrize("name", NEW)
def test_compiled_epochs_in_bfloat16(bases: dict[str, str], name: str, tmp_path: Path):
    """On a GPU, with guidance, prompts of unlike lengths, and the text encoders in host memory."""
    config = quick(tmp_path, bases[name], precision="bf16", compile=True, memory_efficient=True, total_pairs_per_epoch=10)
    run = train(Job(0, 1, torch.device("cuda", 0)), config)
    assert run.compile_seconds is not None
    steps = log_of(run.folder, "step")
    assert all(step["applied"] for step in steps) and steps[0]["ratio_first"] == pytest.approx(1, abs=1e-2)
    assert len(log_of(run.folder, "eval")) == 3


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_train_the_same_adapters(bases: dict[str, str], tmp_path: Path, processes: int):
    """With whole transformers, and to the bit alike with transformers spread over the processes."""
    models = [bases[name] for name in FAMILIES]
    done = run_ranks(processes, "tests/family_probe.py", tmp_path / "many.pt", tmp_path / "many", *models)
    assert done.returncode == 0, done.stderr[-3000:]
    adapters = torch.load(tmp_path / "many.pt", weights_only=True)
    for model, many, sharded in zip(models, adapters[::2], adapters[1::2], strict=True):
        assert torch.equal(sharded, many)
        run = train(Job(0, 1, CPU), few(tmp_path / "one", model))
        one = torch.cat([p.detach().flatten() for p in run.model.trainable()])
        fresh = FlowModel(model, "fp32", CPU)
        fresh.add_lora(4, 8, run.config.seed)
        change = (one - torch.cat([p.detach().flatten() for p in fresh.trainable()])).norm()
        assert change > 0 and (one - many).norm() / change < 0.02


@pytest.mark.parametrize("name", NEW)
def test_generate_metrics_and_the_export_take_the_run(runs: dict[str, Path], name: str, tmp_path: Path, run_cli):
    run, out = runs[name], tmp_path / "out.png"
    code, said, err = run_cli("generate", "--checkpoint", run, "--prompts", *PROMPTS, "--grid-cols", 1, "--out", out)
    assert code == 0 and "guidance 2.0" in said, err
    assert np.asarray(Image.open(out)).std() > 1
    code, _, err = run_cli(
        "metrics", "--checkpoint", run / "checkpoints" / "epoch-0000001", run / "checkpoints" / "epoch-0000002", "base", "--prompt-set",
        "tiny_heldout", "--num-prompts", 3, "--num-repeats", 2, "--metrics", "pixel_diversity", "--out", tmp_path / "out.json",
    )  # fmt: skip
    assert code == 0, err
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(results) == 3 and len({json.dumps(result["metrics"]) for result in results}) == 3
    assert run_cli("fdfo.export.__main__", run, "--lora", tmp_path / "lora")[0] == 0
    for file in (LORA_FILE, CARD):
        assert (tmp_path / "lora" / file).read_bytes() == (run / "checkpoints" / "epoch-0000002" / file).read_bytes()


@pytest.mark.parametrize("name", NEW)
def test_the_code_in_a_card_draws(runs: dict[str, Path], bases: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch):
    """With the guidance of the training in the pipeline's own unit: Z-Image's 1 is our 2."""
    monkeypatch.chdir(Path(bases[name]).parent)
    folder, names = runs[name] / "checkpoints" / "epoch-0000002", {}
    card = (folder / CARD).read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert f"guidance_scale={2.0 if name == 'klein' else 1.0}" in code and ("so that 0.0 means none" in card) == (
        name == "z_image"
    )
    exec(code.replace("FOLDER", str(folder)), names)
    assert np.asarray(names["image"]).shape == (64, 64, 3)


@pytest.mark.parametrize(
    "family,preset,base,licence,words",
    [
        (StableDiffusion3, "sd35-large", SD35_LARGE, "other", "Powered by Stability AI. Derived from [stabilityai/stable-diffusion-3.5-large]"),
        (Flux2Klein, "flux2-klein", KLEIN_4B, "apache-2.0", "Apache-2.0, as the base model"),
        (Flux2Klein, "flux2-klein", KLEIN_9B, "other", "FLUX Non-Commercial License"),
        (ZImage, "z-image", Z_IMAGE, "apache-2.0", "Apache-2.0, as the base model"),
    ],
)  # fmt: skip
def test_cards_have_the_licence_of_their_base(family, preset: str, base: str, licence: str, words: str):
    config = dataclasses.replace(PRESETS[preset], pretrained_model=base)
    text = model_card(Origin(family, base, config, True, 1.0, 10), merged=False)
    data = ModelCard(text).data.to_dict()
    assert data["license"] == licence and data["base_model"] == base and words in text
    assert f"{family.pipeline.__name__}.from_pretrained" in text


def test_an_adapter_is_not_exported_for_the_base_of_another_family(runs: dict[str, Path], tmp_path: Path, run_cli):
    """Without its run the base is that of a preset."""
    for name, preset in (("klein", "flux2-klein"), ("z_image", "z-image")):
        alone = tmp_path / name
        alone.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(runs[name] / "checkpoints" / "epoch-0000002" / file, alone)
        code, _, err = run_cli("fdfo.export.__main__", alone, "--lora", tmp_path / "out")
        assert code == 2 and "name its own base model with --preset or --pretrained-model" in err
        assert run_cli("fdfo.export.__main__", alone, "--lora", tmp_path / f"lora_{name}", "--preset", preset)[0] == 0


@pytest.mark.parametrize("name", NEW)
def test_a_run_starts_from_the_file_of_diffusers(runs: dict[str, Path], bases: dict[str, str], name: str, tmp_path: Path):
    """And not from one of another family."""
    file = runs[name] / "checkpoints" / "epoch-0000002" / LORA_FILE
    start = find_start(str(shutil.copy(file, tmp_path / "style.safetensors")))
    config = with_lora_of(quick(tmp_path / "runs", bases[name], num_epochs=1, eval_prompts=0), start, ())
    assert (config.lora_rank, config.lora_alpha) == (4, 4)
    assert train(Job(0, 1, CPU), config, start).progress.epochs == 1
    other = with_lora_of(quick(tmp_path / "none", "tiny", num_epochs=1), start, ())
    with pytest.raises(UserError, match="give an adapter"):
        train(Job(0, 1, CPU), other, start)
