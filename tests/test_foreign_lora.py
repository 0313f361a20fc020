"""Runs that start from a LoRA of another program: plain PEFT, diffusers, lora_down / lora_up with alpha; what is refused."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, ROOT
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from hub_server import HubServer
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_training import log_of, small

from fdfo.config.errors import UserError
from fdfo.distributed.job import Job
from fdfo.method.evaluate import draw_held_out, image_noise
from fdfo.method.prepare import prepare
from fdfo.model.images import quantised
from fdfo.model.lora import LORA_TARGETS, lora_targets
from fdfo.run_folder.find_checkpoint import find_checkpoint, read_config
from fdfo.run_folder.start import find_start, with_lora_of
from fdfo.storage.adapters import read_lora_adapter
from fdfo.storage.foreign_lora import read_lora_file, translated
from fdfo.storage.hub import LORA_FILE
from fdfo.tiny import TEXT_TOKENS, TINY_MODEL

JOB = Job(0, 1, CPU)
SOME = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")  # what diffusers' training script of SD3 adapts
ALL = tuple(f"attn.{name}" for name in LORA_TARGETS)


def stock() -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(str(TINY_MODEL), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_random_lora(rank: int, alpha: float, targets: tuple[str, ...]) -> StableDiffusion3Pipeline:
    """The stock pipeline with a random LoRA that moves its images far."""
    pipe = stock()
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=False))
    return pipe


def down_up(pipe: StableDiffusion3Pipeline, name, alpha: float) -> dict[str, torch.Tensor]:
    """The LoRA under the names that `name` gives to its layers, with an alpha each."""
    tensors = {}
    for key, tensor in get_peft_model_state_dict(pipe.transformer).items():
        module, _, part = key.removesuffix(".weight").rpartition(".lora_")
        tensors[f"{name(module)}.lora_{'down' if part == 'A' else 'up'}.weight"] = tensor.contiguous()
        tensors[f"{name(module)}.alpha"] = torch.tensor(alpha)
    return tensors


def by_peft(folder: Path) -> tuple[Path, StableDiffusion3Pipeline]:
    from peft import get_peft_model

    pipe = stock()
    torch.manual_seed(0)
    config = LoraConfig(r=5, lora_alpha=7, target_modules=list(ALL), init_lora_weights=False)
    get_peft_model(pipe.transformer, config).save_pretrained(folder)
    return folder, pipe


def by_diffusers(folder: Path) -> tuple[Path, StableDiffusion3Pipeline]:
    """As training scripts write it, without its alpha, which diffusers then takes for the rank."""
    pipe = with_random_lora(6, 6, SOME)
    StableDiffusion3Pipeline.save_lora_weights(folder, get_peft_model_state_dict(pipe.transformer))
    again = stock()
    again.load_lora_weights(str(folder), weight_name=LORA_FILE)
    return folder, again


def by_diffusers_with_settings(folder: Path) -> tuple[Path, StableDiffusion3Pipeline]:
    pipe = with_random_lora(6, 9, SOME)
    settings = _collate_lora_metadata({"transformer": pipe.transformer})
    StableDiffusion3Pipeline.save_lora_weights(folder, get_peft_model_state_dict(pipe.transformer), **settings)
    again = stock()
    again.load_lora_weights(str(folder), weight_name=LORA_FILE)
    return folder / LORA_FILE, again


def with_alpha(folder: Path) -> tuple[Path, StableDiffusion3Pipeline]:
    """lora_down and lora_up with alpha 2.5. Diffusers knows neither in a file for SD3, but takes alphas apart from the tensors."""
    pipe = with_random_lora(5, 2.5, ALL)
    tensors, folder = down_up(pipe, "transformer.{}".format, 2.5), folder / "own"
    folder.mkdir()
    save_file(tensors, folder / "mine.safetensors")
    again, alphas = stock(), {key: value.item() for key, value in tensors.items() if key.endswith("alpha")}
    weights = {
        key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): tensor
        for key, tensor in tensors.items()
        if key not in alphas
    }
    again.transformer.load_lora_adapter(weights, network_alphas=alphas)
    return folder / "mine.safetensors", again


def by_kohya(folder: Path) -> tuple[Path, StableDiffusion3Pipeline]:
    """Diffusers' names with underscores; layers differ in rank and alpha."""
    pipe = with_random_lora(4, 8, ALL)
    tensors = down_up(pipe, lambda module: "lora_transformer_" + module.replace(".", "_"), 8.0)
    name = "lora_transformer_transformer_blocks_1_attn_to_k"
    tensors[f"{name}.lora_down.weight"] = torch.cat([tensors[f"{name}.lora_down.weight"], torch.zeros(2, 128)])
    tensors[f"{name}.lora_up.weight"] = torch.cat([tensors[f"{name}.lora_up.weight"], torch.ones(128, 2)], dim=1)
    tensors[f"{name}.alpha"] = torch.tensor(12.0)
    save_file({key: tensor.half() for key, tensor in tensors.items()}, folder / "mine.safetensors")
    with torch.no_grad():
        for key, parameter in pipe.transformer.named_parameters():
            if "lora_" in key:
                parameter.copy_(parameter.half())
    return folder / "mine.safetensors", pipe


KINDS = {
    "PEFT": (by_peft, 5, 7, 31), "diffusers": (by_diffusers, 6, 6, 16), "diffusers, settings": (by_diffusers_with_settings, 6, 9, 16),
    "alpha": (with_alpha, 5, 2.5, 31), "kohya": (by_kohya, 4, 8, 31),
}  # fmt: skip


@pytest.mark.parametrize("kind,rank,alpha,layers", KINDS.values(), ids=KINDS.keys())
def test_a_run_starts_with_the_images_of_the_lora(tmp_path: Path, kind, rank: int, alpha: float, layers: int):
    """The held-out images of epoch 0 are those that diffusers alone draws from the same noise with the same LoRA."""
    (tmp_path / "lora").mkdir()
    path, pipe = kind(tmp_path / "lora")
    start = find_start(str(path))
    config = with_lora_of(small(tmp_path / "runs", eval_prompts=2, eval_metrics=()), start, ())
    assert (config.lora_rank, config.lora_alpha) == (rank, alpha) and not start.resumed
    assert len(read_lora_adapter(start.checkpoint.adapter).modules) == layers
    run = prepare(JOB, config, start)
    assert len(run.model.trainable()) == 2 * len(lora_targets(stock().transformer))
    ours, _ = draw_held_out(run.model, config, run.plan, run.held_out, lambda start: None)
    latents = torch.stack([image_noise((16, 8, 8), prompt, 0) for prompt in range(2)])

    def drawn(pipe: StableDiffusion3Pipeline) -> torch.Tensor:
        images = pipe(
            run.held_out.prompts, guidance_scale=1.0, num_inference_steps=4, latents=latents, height=64, width=64,
            max_sequence_length=TEXT_TOKENS, output_type="pt",
        ).images  # fmt: skip
        return quantised(images).int()

    expected = drawn(pipe)
    assert (expected - drawn(stock())).abs().float().mean() > 1
    assert (ours.int() - expected).abs().max() <= 1


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_alpha(tmp_path_factory.mktemp("lora"))[0]


def test_such_a_run_resumes_exports_and_is_drawn(run_cli, lora: Path, tmp_path: Path):
    """Stopped after an epoch and resumed, it ends as one that ran through; its rank and alpha come from the LoRA throughout."""
    few = ("--preset", "tiny", "--total-pairs-per-epoch", 6, "--sample.num-solver-steps", 4, "--eval-prompts", 2,
           "--save-freq", 1)  # fmt: skip
    for folder, epochs in (("through", 2), ("stopped", 1)):
        code, out, err = run_cli("train", *few, "--num-epochs", epochs, "--resume-from", lora, "--runs-dir", tmp_path / folder)
        assert code == 0 and "a new run starts from it at epoch 0" in out, err
    through, stopped = (next((tmp_path / folder).iterdir()) for folder in ("through", "stopped"))
    code, out, err = run_cli("train", "--resume-from", stopped, "--num-epochs", 2)
    assert code == 0 and "after epoch 1" in out, err
    states = [load_file(run / "checkpoints" / "epoch-0000002" / "adapter_model.safetensors") for run in (through, stopped)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert (read_config(stopped).lora_rank, read_config(stopped).lora_alpha) == (5, 2.5)
    assert "| LoRA rank, alpha | 5, 2.5 |" in (stopped / "checkpoints" / "epoch-0000002" / "README.md").read_text()
    assert [line["epoch"] for line in log_of(stopped, "eval")] == [0, 2] and (stopped / "report.html").is_file()
    assert not find_start(str(stopped / "checkpoints" / "epoch-0000002" / LORA_FILE)).resumed
    assert run_cli("fdfo.export.__main__", stopped, "--lora", tmp_path / "exported")[0] == 0
    score = (
        "--preset",
        "tiny",
        "--prompt-set",
        "tiny_heldout",
        "--num-prompts",
        1,
        "--metrics",
        "scene",
        "--num-inference-steps",
        4,
    )
    checkpoints = (lora, stopped / "checkpoints" / "epoch-0000002", tmp_path / "exported", tmp_path / "exported" / LORA_FILE)
    code, out, err = run_cli("metrics", *score, "--checkpoint", *checkpoints, "--out", tmp_path / "m.json")
    assert code == 0, err
    scores = [result["metrics"]["scene"]["mean"] for result in json.loads((tmp_path / "m.json").read_text())["results"]]
    assert scores[1] == pytest.approx(scores[2], abs=0.1) and scores[2] == scores[3]
    code, out, err = run_cli(
        "generate", "--preset", "tiny", "--checkpoint", lora, "--prompts", "a ring", "--out", tmp_path / "x.png"
    )
    assert code == 0 and "own/mine.safetensors" not in err


def test_rank_and_alpha_that_disagree_are_refused(run_cli, lora: Path, tmp_path: Path):
    start = ("--preset", "tiny", "--resume-from", lora, "--runs-dir", tmp_path / "runs")
    code, _, err = run_cli("train", *start, "--lora-rank", 32)
    assert code == 2 and "--lora-rank is 32, that of own/mine.safetensors is 5: leave it out" in err
    code, _, err = run_cli("train", *start, "--lora_alpha=3")
    assert code == 2 and "--lora-alpha is 3, that of own/mine.safetensors is 2.5: leave it out" in err
    assert not (tmp_path / "runs").exists()


def test_layers_that_are_not_trained_are_named_and_merged_by_the_export(run_cli, tmp_path: Path):
    """The merged pipeline draws as diffusers does with the LoRA, and trains like any other."""
    pipe = with_random_lora(4, 4, (*SOME, "ff.net.2", "attn2.to_q"))
    StableDiffusion3Pipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(pipe.transformer))
    start = (
        "--preset",
        "tiny",
        "--total-pairs-per-epoch",
        2,
        "--num-epochs",
        1,
        "--eval-prompts",
        0,
        "--runs-dir",
        tmp_path / "runs",
    )
    code, _, err = run_cli("train", *start, "--resume-from", tmp_path / "lora")
    assert (
        code == 2
        and "layers that FDFO does not train (" in err
        and "--merge FOLDER" in err
        and len(err.strip().splitlines()) == 1
    )
    assert "transformer_blocks.*.attn2.to_q, transformer_blocks.*.ff.net.2" in err and "attn.to_q" not in err
    assert run_cli("fdfo.export.__main__", tmp_path / "lora", "--preset", "tiny", "--merge", tmp_path / "merged")[0] == 0
    merged = StableDiffusion3Pipeline.from_pretrained(str(tmp_path / "merged"), torch_dtype=torch.float32).transformer
    given = (torch.randn(1, 16, 8, 8), torch.randn(1, 32, 96), torch.randn(1, merged.config.pooled_projection_dim))
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    with torch.no_grad():
        one, two = (
            part(**dict(zip(names, given, strict=True)), timestep=torch.tensor([500.0]), return_dict=False)[0]
            for part in (merged, pipe.transformer)
        )
    torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2 * two.abs().max().item())  # the pipeline is written in bfloat16
    code, _, err = run_cli("train", *start, "--pretrained-model", tmp_path / "merged")
    assert code == 0, err


def test_layers_that_are_left_out_start_as_a_fresh_lora(tmp_path: Path):
    path, _ = by_diffusers(tmp_path / "lora")
    models = []
    for seed in (1, 1, 2):
        config = with_lora_of(small(tmp_path / "runs", seed=seed), find_start(str(path)), ())
        models.append(dict(prepare(JOB, config, find_start(str(path))).model.named_trainable()))
    fresh = "transformer_blocks.0.attn.add_q_proj.lora_{}.default.weight".format
    keys = [next(key for key in models[0] if key.endswith(fresh(part))) for part in "AB"]
    assert models[0][keys[0]].std() > 0 and not models[0][keys[1]].any()
    assert torch.equal(models[0][keys[0]], models[1][keys[0]]) and not torch.equal(models[0][keys[0]], models[2][keys[0]])


def test_queries_keys_and_values_in_one_are_taken_apart(tmp_path: Path):
    """Stability's names: the product of the parts is the product of the whole, slice by slice."""
    torch.manual_seed(0)
    A, B = torch.randn(3, 8), torch.randn(24, 3)
    for name in ("lora_unet_joint_blocks_7_context_block_attn_qkv", "diffusion_model.joint_blocks.7.context_block.attn.qkv"):
        save_file({f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}, tmp_path / "x.safetensors")
        layers = read_lora_file(tmp_path / "x.safetensors").layers
        assert list(layers) == [f"transformer_blocks.7.attn.add_{part}_proj" for part in "qkv"]
        assert torch.equal(torch.cat([layer.B @ layer.A for layer in layers.values()]), B @ A)
    assert translated("lora_unet_joint_blocks_0_x_block_attn_proj") == ("transformer_blocks.0.attn.to_out.0",)
    assert translated("lora_te1_text_model_encoder_layers_0_mlp_fc1") == ("lora_te1_text_model_encoder_layers_0_mlp_fc1",)


def test_a_lora_on_the_hub(lora: Path, tmp_path: Path):
    """A file by its name, at the root or in a folder, and a folder with the name that diffusers writes."""
    files = {"mine.safetensors": lora.read_bytes(), f"a/{LORA_FILE}": lora.read_bytes() + b"", "README.md": b"not to be fetched"}
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    names = [f"https://huggingface.co/o/n/{view}/main/mine.safetensors" for view in ("blob", "resolve")]
    names += ["hf:o/n/mine.safetensors", "hf:o/n/a", "https://huggingface.co/o/n/tree/main/a"]
    code = (
        "import sys; from fdfo.run_folder.start import find_start\nfor n in sys.argv[1:]: print(find_start(n).checkpoint.label)"
    )
    with HubServer("o/n", files) as server:
        environment["HF_ENDPOINT"] = server.url
        done = subprocess.run([sys.executable, "-c", code, *names], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["n/mine.safetensors"] * 3 + ["n/a"] * 2 and "README.md" not in server.served


def test_files_that_are_no_plain_lora_are_refused(tmp_path: Path):
    path, A, B = tmp_path / "x.safetensors", torch.randn(4, 128), torch.randn(128, 4)
    name = "transformer.transformer_blocks.0.attn.to_q"
    good = {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}

    def refused(says: str, tensors: dict, settings: str | None = None) -> None:
        save_file(tensors, path, metadata=None if settings is None else {"lora_adapter_metadata": settings})
        with pytest.raises(UserError, match=says):
            find_start(str(path))
            with_lora_of(small(tmp_path), find_start(str(path)), ())

    refused("more than a plain LoRA", good | {f"{name}.dora_scale": torch.ones(1)})
    refused("more than a plain LoRA", {f"{name}.lokr_w1": A})
    refused("more, or less, than a plain LoRA", {f"{name}.lora_down.weight": A})
    refused("more, or less, than a plain LoRA", good | {f"{name}.lora_up.weight": torch.randn(128, 5)})
    refused("no positive alpha", good | {f"{name}.alpha": torch.tensor(math.nan)})
    refused("no positive alpha", good | {f"{name}.alpha": torch.tensor(0.0)})
    refused("twice", good | {key.replace("transformer.t", "t"): tensor + 1 for key, tensor in good.items()})
    refused("has no weights", {})
    refused("not finite", good | {f"{name}.lora_down.weight": torch.full((4, 128), math.inf)})
    refused("cannot be read", good, "[1")
    refused("cannot be read", good, "[]")
    refused("is not the configuration of a plain LoRA", good, json.dumps({"transformer.peft_type": "LOHA"}))
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read as a LoRA file"):
        find_checkpoint(str(path))
    with pytest.raises(UserError, match="holds no adapter"):
        find_checkpoint(str(tmp_path / "nowhere.safetensors"))


def test_a_lora_of_another_model_is_refused(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    for name, size, says in (
        ("lora_unet_down_blocks_0_attentions_0_proj_in", 128, "1 layers that FDFO does not train .lora|down_blocks"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", 128, "take them out"),
        ("transformer.transformer_blocks.0.attn.to_q", 1536, "does not fit tiny"),
    ):
        save_file({f"{name}.lora_A.weight": torch.zeros(4, size), f"{name}.lora_B.weight": torch.zeros(size, 4)}, path)
        start = find_start(str(path))
        with pytest.raises(UserError, match=says):
            prepare(JOB, with_lora_of(dataclasses.replace(small(tmp_path / "runs")), start, ()), start)
    assert not (tmp_path / "runs").exists()
