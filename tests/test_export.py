"""Adapters taken elsewhere: drawn with diffusers alone, merged, uploaded; the model card; what is refused."""

import dataclasses
import json
import math
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_training import small

from fdfo.config.errors import UserError
from fdfo.config.plan import plan_images
from fdfo.config.tool_options import GenerateConfig
from fdfo.config.train_options import SD35_MEDIUM, OptimConfig, SampleConfig, TrainConfig
from fdfo.distributed.job import Job
from fdfo.method.trainer import train
from fdfo.model.families.sd3 import LORA_TARGETS, StableDiffusion3
from fdfo.model.flow_model import FlowModel
from fdfo.model.images import draw_images, encode_for_images, load_for_images
from fdfo.run_folder.find_checkpoint import CARD, STATE, find_checkpoint, read_state, saved_config
from fdfo.run_folder.lora_file import read_lora
from fdfo.run_folder.model_card import Origin, model_card
from fdfo.run_folder.start import find_start
from fdfo.storage.atomic_files import seal
from fdfo.storage.hub import LORA_FILE
from fdfo.tiny import TEXT_TOKENS, TINY_MODEL

PROMPTS = ["a red circle on a white background", "a blue ring above a green cross on a black background"]
SEEDS = [3, 4]
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs with guidance 2, and with a learning rate that moves the adapter far."""
    sample, optimizer = SampleConfig(4, 2.0, 64), OptimConfig(learning_rate=4e-3, clip_range=0.2)
    config = small(tmp_path_factory.mktemp("runs"), num_epochs=2, save_freq=1, sample=sample, train=optimizer)
    return train(Job(0, 1, CPU), config).folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter by PEFT itself, without a run, whose modules differ in rank and alpha, scaled by rank-stabilised LoRA."""
    folder, model = tmp_path_factory.mktemp("cfg-2.0") / "epoch-0000007", FlowModel("tiny", "fp32", CPU)
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=[f"attn.{name}" for name in LORA_TARGETS], init_lora_weights=False,
        rank_pattern={".*to_q": 9, "^transformer_blocks.0.attn.to_k": 2}, alpha_pattern={r"[12]\.attn\.add_q_proj": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    get_peft_model(model.pipe.transformer, config).save_pretrained(folder)
    return folder


def drawn(checkpoint: Path | None, **flags: object) -> torch.Tensor:
    """The images [2, 3, 64, 64] as generate.py draws them."""
    found = find_checkpoint(str(checkpoint)) if checkpoint else None
    config = GenerateConfig(Path("x.png"), preset="tiny", guidance_scale=2.0, num_inference_steps=4, **flags)
    plan = plan_images(config, saved_config(found), None)
    model = load_for_images(plan, checkpoint, CPU)
    return torch.cat(list(draw_images(model, encode_for_images(model, PROMPTS), [0, 1], SEEDS, plan.settings))).int()


def drawn_by_diffusers(pipe: StableDiffusion3Pipeline) -> torch.Tensor:
    """The same images by the stock pipeline."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        PROMPTS, guidance_scale=2.0, num_inference_steps=4, height=64, width=64, max_sequence_length=TEXT_TOKENS,
        generator=generators, output_type="pt",
    ).images  # fmt: skip
    return (255 * images).round().int()


def stock(folder: Path = TINY_MODEL) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(str(folder), torch_dtype=torch.float32)


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return (one - two).abs().max() <= 2


def test_diffusers_alone_draws_the_same_pictures(run: Path, monkeypatch: pytest.MonkeyPatch):
    """From the checkpoint's own folder, whose other files are not mistaken for the LoRA.

    Some versions of diffusers look into a folder only where HF_HUB_OFFLINE is not set, which it is for the tests.
    """
    monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)
    expected = drawn(run / "checkpoints" / "epoch-0000002")
    assert (expected - drawn(None)).abs().float().mean() > 1
    pipe = stock()
    pipe.load_lora_weights(str(run / "checkpoints" / "epoch-0000002"))
    assert same(drawn_by_diffusers(pipe), expected)


@torch.no_grad()
def test_a_loader_that_knows_no_alpha_draws_the_same_pictures(run: Path):
    file = run / "checkpoints" / "epoch-0000002" / LORA_FILE
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    tensors, pipe = load_file(file), stock()
    assert len(tensors) == 62 and all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            pipe.transformer.get_submodule(name).weight += tensors[f"transformer.{name}.lora_B.weight"] @ tensors[key]
    assert same(drawn_by_diffusers(pipe), drawn(run / "checkpoints" / "epoch-0000002"))


def test_ranks_and_alphas_of_a_foreign_adapter_are_kept(run_cli, foreign: Path, tmp_path: Path):
    code, out, err = run_cli("fdfo.export.__main__", foreign, "--preset", "tiny", "--lora", tmp_path / "lora")
    assert code == 0, err
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {LORA_FILE, CARD}
    assert {min(tensor.shape) for tensor in load_file(tmp_path / "lora" / LORA_FILE).values()} == {9}
    expected, pipe = drawn(foreign), stock()
    assert (expected - drawn(None)).abs().float().mean() > 1
    pipe.load_lora_weights(str(tmp_path / "lora"), weight_name=LORA_FILE)
    assert same(drawn_by_diffusers(pipe), expected)
    card = (tmp_path / "lora" / CARD).read_text()
    assert "guidance_scale=2.0" in card and "Trained for 7 epochs\n" in card and "Reward" not in card
    assert "Trained with FDFO" not in card and "license" not in card


def test_the_export_of_a_runs_checkpoint_is_what_the_checkpoint_carries(run_cli, run: Path, tmp_path: Path):
    assert run_cli("fdfo.export.__main__", run, "--lora", tmp_path / "new" / "lora")[0] == 0
    for name in (LORA_FILE, CARD):
        assert (tmp_path / "new" / "lora" / name).read_bytes() == (run / "checkpoints" / "epoch-0000002" / name).read_bytes()


def test_a_merged_pipeline_is_a_pipeline_like_any_other(run_cli, run: Path, tmp_path: Path):
    merged, half = tmp_path / "merged", tmp_path / "half"
    code, out, err = run_cli("fdfo.export.__main__", run, "--merge", merged)
    assert code == 0 and str(merged) in out, err
    expected = drawn(run / "checkpoints" / "epoch-0000002")
    assert same(drawn_by_diffusers(stock(merged)), expected)
    assert same(drawn(None, pretrained_model=str(merged)), expected)
    texts = [path.read_text() for path in merged.rglob("*") if path.suffix in (".json", ".md")]
    assert not any(str(ROOT) in text or str(tmp_path) in text for text in texts)
    assert run_cli("fdfo.export.__main__", run, "--merge", half, "--dtype", "fp16")[0] == 0
    weights = load_file(half / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert same(drawn_by_diffusers(stock(half)), expected)
    assert run_cli("train", "--preset", "tiny", "--pretrained-model", merged, "--total-pairs-per-epoch", 2, "--num-epochs", 1,
                   "--eval-prompts", 0, "--runs-dir", tmp_path / "runs")[0] == 0  # fmt: skip
    card = next(tmp_path.glob("runs/*/checkpoints/*/README.md")).read_text()
    assert "LoRA for merged" in card and "base_model" not in card and str(tmp_path) not in card


def test_the_code_in_a_card_draws(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    folder, names = run / "checkpoints" / "epoch-0000002", {}
    code = (folder / CARD).read_text().split("```python\n")[1].split("```")[0]
    assert "guidance_scale=2.0" in code and len([line for line in code.splitlines() if line]) == 5
    torch.manual_seed(3)
    exec(code.replace("FOLDER", str(folder)), names)
    pixels = torch.from_numpy(np.array(names["image"])).permute(2, 0, 1).int()
    assert same(pixels, drawn(folder)[0])


def test_the_card_of_stable_diffusion():
    config = dataclasses.replace(TrainConfig(), prompt_set="/home/me/prompts.txt", runs_dir=Path("/home/me/runs"))
    text = model_card(Origin(StableDiffusion3, SD35_MEDIUM, config, True, 4.5, 100), merged=False)
    data = ModelCard(text).data.to_dict()
    assert (data["base_model"], data["library_name"], data["license"]) == (SD35_MEDIUM, "diffusers", "other")
    assert data["license_name"] == "stabilityai-ai-community" and data["license_link"].endswith("LICENSE.md")
    assert data["tags"] == ["lora", "text-to-image", "fdfo"]
    for part in ("1 pickscore + 0.1 vlm_alignment", "100 epochs of 432 pairs", "guidance_scale=4.5", 'load_lora_weights("FOLDER", weight_name="pytorch_lora',
                 "torch.bfloat16", "height=512", "| learning rate, clip range, KL weight, proximal weight | 3e-05, 0.03, 0.0, 0.0 |",
                 "| trained on | trajectories |", "Powered by Stability AI", "hf upload OWNER/NAME FOLDER",
                 f"torch {version('torch')}", "| prompts.txt |"):  # fmt: skip
        assert part in text
    assert "/home/me" not in text
    merged = model_card(Origin(StableDiffusion3, SD35_MEDIUM, config, True, 4.5, 100), merged=True)
    assert "load_lora_weights" not in merged and ModelCard(merged).data.to_dict()["base_model_relation"] == "finetune"


def test_a_config_json_of_somebody_else_runs_no_code(run_cli, run: Path, tmp_path: Path):
    """The card names a reward of somebody's own without importing it."""
    other = tmp_path / "run"
    shutil.copytree(run, other)
    config = json.loads((other / "config.json").read_text()) | {"reward_specs": ["antigravity_of_theirs:Reward=0.5"]}
    (other / "config.json").write_text(json.dumps(config))
    assert run_cli("fdfo.export.__main__", other, "--lora", tmp_path / "lora")[0] == 0
    assert "0.5 antigravity_of_theirs:Reward" in (tmp_path / "lora" / CARD).read_text()
    (other / "config.json").write_text(json.dumps(config | {"reward_specs": ["scene=much"]}))
    code, _, err = run_cli("fdfo.export.__main__", other, "--lora", tmp_path / "again")
    assert code == 2 and "restore the file" in err


def test_checkpoints_of_before_resume(run: Path, tmp_path: Path):
    """Without the LoRA of diffusers and the card, as this code wrote them until it exported."""
    older = tmp_path / run.name
    shutil.copytree(run, older)
    for folder in (older / "checkpoints").iterdir():
        state = read_state(folder)
        for name in (LORA_FILE, CARD, STATE):
            (folder / name).unlink()
        seal(folder, STATE, state)
    checkpoint = find_checkpoint(str(older))
    config = dataclasses.replace(saved_config(checkpoint), num_epochs=3)
    train(Job(0, 1, CPU), config, find_start(str(older)))
    assert (older / "checkpoints" / "epoch-0000003" / LORA_FILE).is_file()


WRONG = {
    "nothing to write": (["CHECKPOINT"], "either --lora FOLDER or --merge FOLDER"),
    "no checkpoint": (["nowhere", "--lora", "OUT"], "nowhere holds no adapter"),
    "there already": (["CHECKPOINT", "--merge", "."], "exists already"),
    "no folder": (["CHECKPOINT", "--lora", "LICENSE/lora"], "LICENSE/lora cannot be written"),
    "both": (["CHECKPOINT", "--lora", "OUT", "--merge", "OUT"], "either --lora FOLDER or --merge FOLDER"),
    "type of a LoRA": (["CHECKPOINT", "--lora", "OUT", "--dtype", "bf16"], "--dtype has no effect"),
    "empty name": (["", "--lora", "OUT"], "--checkpoint is '': it should have at least 1 character"),
    "base model": (["CHECKPOINT", "--merge", "OUT", "--pretrained-model", "LICENSE"], "LICENSE cannot be loaded"),
}


@pytest.mark.parametrize("arguments,says", WRONG.values(), ids=WRONG.keys())
def test_wrong_input_ends_with_one_sentence(run_cli, run: Path, tmp_path: Path, monkeypatch, arguments: list[str], says: str):
    monkeypatch.chdir(ROOT)
    places = {"CHECKPOINT": run, "OUT": tmp_path / "out"}
    code, _, err = run_cli("fdfo.export.__main__", *(places.get(argument, argument) for argument in arguments))
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_adapters_that_cannot_be_exported_are_refused(run_cli, foreign: Path, tmp_path: Path):
    def refused(says: str, flag: str = "--lora", tensors: dict | None = None, **values: object) -> None:
        shutil.rmtree(tmp_path / "spoilt", ignore_errors=True)
        shutil.copytree(foreign, tmp_path / "spoilt")
        path = tmp_path / "spoilt" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        if tensors is not None:
            save_file(tensors, tmp_path / "spoilt" / "adapter_model.safetensors")
        code, _, err = run_cli("fdfo.export.__main__", tmp_path / "spoilt", "--preset", "tiny", flag, tmp_path / "out")
        assert code == 2 and says in err and [path.name for path in tmp_path.iterdir()] == ["spoilt"]

    state = load_file(foreign / "adapter_model.safetensors")
    key = "base_model.model.transformer_blocks.0.attn.to_v.lora_{}.weight".format
    refused("it sets use_dora", use_dora=True)
    refused("lora_bias", lora_bias=True)
    refused("is not the configuration of a plain LoRA", alpha_pattern={"[": 3})
    refused("does not have rank 5", r=5)
    refused("does not have rank 4", tensors={name: tensor for name, tensor in state.items() if name != key("A")})
    refused("does not have rank 4", tensors=state | {key("B"): torch.zeros(3)})
    refused("it has stranger", tensors=state | {"stranger": torch.zeros(1)})
    refused("has no weights", tensors={})
    refused("numbers that are not finite", tensors=state | {key("B"): torch.full_like(state[key("B")], math.nan)})
    wide = {key("A"): torch.zeros(4, 1536), key("B"): torch.zeros(1536, 4)}
    refused("does not fit the base model (at transformer_blocks.0.attn.to_v)", "--merge", tensors=wide)
    nowhere = {name.replace("to_v", "to_x"): tensor for name, tensor in state.items()}
    refused("does not fit the base model (at transformer_blocks.0.attn.to_x)", "--merge", tensors=nowhere)
    (tmp_path / "spoilt" / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read"):
        read_lora(tmp_path / "spoilt")
