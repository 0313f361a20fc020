"""The exported LoRA under the names of other programs: ComfyUI's matrices, SD.Next's tensors, the workflow."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_foreign_lora import by_peft

from fdfo.model.families.sd3 import StableDiffusion3
from fdfo.run_folder.lora_file import SDNEXT_FILE, read_lora
from fdfo.storage.foreign_lora import JOINT_LEAVES, translated
from fdfo.storage.hub import LORA_FILE
from fdfo.tiny import TINY_MODEL

BLOCKS, WIDTH = 24, 1536  # of Stable Diffusion 3.5 Medium
# ComfyUI's matrix of a stream, and the third of its rows that a layer of ours is; None is all of it.
COMFYUI = {
    "to_q": ("x_block.attn.qkv", 0), "to_k": ("x_block.attn.qkv", 1), "to_v": ("x_block.attn.qkv", 2), "to_out.0": ("x_block.attn.proj", None),
    "add_q_proj": ("context_block.attn.qkv", 0), "add_k_proj": ("context_block.attn.qkv", 1), "add_v_proj": ("context_block.attn.qkv", 2),
    "to_add_out": ("context_block.attn.proj", None),
}  # fmt: skip


def comfyui_place(module: str) -> tuple[str, int | None]:
    """ComfyUI's name of the matrix that a layer of ours belongs to, and which third of its rows it is."""
    _, block, _, leaf = module.split(".", 3)
    name, third = COMFYUI[leaf]
    return f"joint_blocks.{block}.{name}.weight", third


@pytest.fixture(scope="module")
def medium() -> SD3Transformer2DModel:
    """Stable Diffusion 3.5 Medium's transformer, without weights."""
    with torch.device("meta"):
        return SD3Transformer2DModel(
            sample_size=128, num_layers=BLOCKS, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
            caption_projection_dim=WIDTH, pooled_projection_dim=2048, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm", in_channels=16, out_channels=16,
        )  # fmt: skip


@pytest.fixture(scope="module")
def adapter(medium: SD3Transformer2DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of its shapes, as the published ones lie on the hub."""
    folder, targets = (
        tmp_path_factory.mktemp("fdfo-combined-reward-cfg-4.5") / "epoch-0000100",
        StableDiffusion3.lora_targets(medium),
    )
    folder.mkdir()
    LoraConfig(r=2, lora_alpha=4, target_modules=targets).save_pretrained(folder)
    torch.manual_seed(0)
    save_file(
        {
            f"base_model.model.{name}.lora_{part}.weight": torch.randn(shape)
            for name in targets
            for part, shape in (("A", (2, WIDTH)), ("B", (WIDTH, 2)))
        },
        folder / "adapter_model.safetensors",
    )
    return folder


@pytest.fixture(scope="module")
def exported(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fdfo.config.tool_options import ExportConfig
    from fdfo.export.__main__ import export

    folder = tmp_path_factory.mktemp("exported") / "lora"
    export(ExportConfig(str(adapter), lora=folder))
    return folder


def test_every_layer_has_its_place_in_comfyui(exported: Path):
    """191 layers fill the 95 matrices of the joint attention; the last block has no output of the text stream."""
    tensors = load_file(exported / LORA_FILE)
    matrices: dict[str, dict] = {}
    for key, A in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        B = tensors[f"transformer.{module}.lora_B.weight"]
        assert A.shape[1] == WIDTH and B.shape == (WIDTH, A.shape[0])
        name, third = comfyui_place(module)
        assert third not in matrices.setdefault(name, {})
        matrices[name][third] = B @ A
    expected = {
        f"joint_blocks.{block}.{stream}.attn.{part}.weight": (rows, WIDTH)
        for block in range(BLOCKS)
        for stream in ("x_block", "context_block")
        for part, rows in (("qkv", 3 * WIDTH), ("proj", WIDTH))
        if (block, stream, part) != (BLOCKS - 1, "context_block", "proj")
    }
    assert len(tensors) == 2 * 191 and len(expected) == 95
    shapes = {
        name: tuple(torch.cat([parts[third] for third in sorted(parts, key=str)]).shape) for name, parts in matrices.items()
    }
    assert shapes == expected
    assert all(set(parts) == ({0, 1, 2} if ".qkv" in name else {None}) for name, parts in matrices.items())


class Native(dict):
    """A checkpoint by Stability's names, whose tensors that no LoRA touches are small."""

    def pop(self, key: str) -> torch.Tensor:
        return super().pop(key, torch.zeros(2))


def test_the_table_is_the_one_by_which_diffusers_converts_checkpoints(medium: SD3Transformer2DModel):
    """Each part of a checkpoint by Stability's names, which are ComfyUI's, arrives in the layer that the two tables name."""
    native, rows = Native({"context_embedder.weight": torch.zeros(2)}), iter(range(10**6))
    for block in range(BLOCKS):
        for leaf, parts in JOINT_LEAVES.items():
            name = f"joint_blocks.{block}.{leaf.replace('block_', 'block.').replace('attn_', 'attn.').replace('attn2_', 'attn2.').replace('mlp_', 'mlp.')}"
            if ("attn2" in leaf and block > 12) or (block == BLOCKS - 1 and "context" in leaf and not leaf.endswith("qkv")):
                continue
            native[f"{name}.weight"] = torch.tensor([[float(next(rows))] for _ in parts])
            if not leaf.startswith(("x_block_mlp", "context_block_mlp")):
                native[f"{name}.bias"] = torch.zeros(len(parts))
            if leaf.endswith("qkv"):
                native[f"{name}.bias"] = torch.zeros(3)
    weights = dict(native)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(native)
    for name, weight in weights.items():
        if name.startswith("joint_blocks") and name.endswith(".weight"):
            modules = translated(f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}")
            assert len(modules) == len(weight)
            assert [converted[f"{module}.weight"].item() for module in modules] == weight.flatten().tolist()
    for module in StableDiffusion3.lora_targets(medium):
        name, third = comfyui_place(module)
        assert converted[f"{module}.weight"].item() == weights[name][third or 0].item()


def test_both_namings_hold_the_same_tensors(run_cli, tmp_path: Path):
    """Diffusers, which does not read lora_down / lora_up for this model, is never misled by them: it refuses, or draws the same."""
    folder, _ = by_peft(tmp_path / "peft")
    for name in ("diffusers", "sdnext"):
        code, _, err = run_cli("fdfo.export.__main__", folder, "--preset", "tiny", "--lora", tmp_path / name, "--format", name)
        assert code == 0, err
    ours, theirs = load_file(tmp_path / "diffusers" / LORA_FILE), load_file(tmp_path / "sdnext" / SDNEXT_FILE)
    renamed = {key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): tensor for key, tensor in theirs.items()}
    assert not ours.keys() & theirs.keys() and ours.keys() == renamed.keys() and len(ours) == 62
    assert all(torch.equal(ours[key], renamed[key]) for key in ours)
    assert {path.name for path in (tmp_path / "sdnext").iterdir()} == {SDNEXT_FILE, "README.md"}
    card = (tmp_path / "sdnext" / "README.md").read_text()
    assert SDNEXT_FILE in card and "load_lora_weights" not in card and "Trigger words: none" in card
    again, first = read_lora(tmp_path / "sdnext" / SDNEXT_FILE), read_lora(tmp_path / "diffusers" / LORA_FILE)
    assert all(torch.equal(again[module][part], first[module][part]) for module in first for part in (0, 1))

    def drawn(file: Path) -> torch.Tensor:
        pipe = StableDiffusion3Pipeline.from_pretrained(str(TINY_MODEL), torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
        generator = torch.Generator().manual_seed(0)
        return pipe("a red ring", guidance_scale=1.0, num_inference_steps=2, height=64, width=64, generator=generator, max_sequence_length=16,
                    output_type="pt").images  # fmt: skip

    image = drawn(tmp_path / "diffusers" / LORA_FILE)
    try:
        other = drawn(tmp_path / "sdnext" / SDNEXT_FILE)
    except (IndexError, KeyError, ValueError, RuntimeError):
        return
    assert torch.equal(other, image)


def test_the_workflow_of_comfyui(exported: Path, run_cli, tmp_path: Path):
    """Every input that is a link names a node that is there; guidance, steps and size are those of the training, strength is 1."""
    nodes = json.loads((exported / "comfyui_workflow.json").read_text())
    links = [value for node in nodes.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert len(links) == 10 and all(node in nodes and output in (0, 1, 2) for node, output in links)
    inputs = {node["class_type"]: node["inputs"] for node in nodes.values()}
    assert inputs["LoraLoaderModelOnly"]["lora_name"] == LORA_FILE and inputs["LoraLoaderModelOnly"]["strength_model"] == 1
    assert (inputs["KSampler"]["cfg"], inputs["KSampler"]["steps"]) == (4.5, 40)
    assert (inputs["EmptySD3LatentImage"]["width"], inputs["EmptySD3LatentImage"]["height"]) == (512, 512)
    peft, _ = by_peft(tmp_path / "peft")
    assert run_cli("fdfo.export.__main__", peft, "--preset", "tiny", "--lora", tmp_path / "tiny")[0] == 0
    assert not (tmp_path / "tiny" / "comfyui_workflow.json").exists()


def test_the_grid_of_the_workflow_is_that_of_training():
    """Of ComfyUI's schedulers `normal` is linear in the timestep, from the first to the last of the shifted thousand, shifted again."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(40)

    def shifted(t: torch.Tensor) -> torch.Tensor:
        return 3 * t / (1 + 2 * t)

    normal = shifted(torch.linspace(1, shifted(torch.tensor(1e-3)).item(), 40))
    torch.testing.assert_close(scheduler.sigmas[:-1], normal, rtol=0, atol=1e-6)


@pytest.mark.parametrize("flags", [["--merge", "x", "--format", "sdnext"]])
def test_a_format_of_no_lora_is_refused(run_cli, adapter: Path, flags: list[str]):
    code, _, err = run_cli("fdfo.export.__main__", adapter, *flags)
    assert code == 2 and "--format has no effect without --lora" in err
