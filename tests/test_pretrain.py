"""The tiny preset's weights: what is shipped, and that the script which made them still makes such a folder."""

import random
from pathlib import Path

import torch
from safetensors import safe_open

from fdfo.model.flow_model import FlowModel
from fdfo.tiny import SCENE_CLIP, TINY_MODEL
from fdfo.tiny.pretrain import PretrainConfig, corrupt, main, sample_scenes
from fdfo.tiny.scenes import is_held_out


def test_shipped_weights_are_small_and_half_precision():
    files = [path for folder in (TINY_MODEL, SCENE_CLIP) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 6 and {path.suffix for path in files} == {".safetensors", ".json"}
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} <= {"F16", "I64"}


def test_training_captions_are_never_held_out():
    rng = random.Random(0)
    scenes = sample_scenes(500, rng)
    wrong = [corrupt(scene, 0.12, rng) for scene in scenes]
    assert not any(is_held_out(scene.caption()) for scene in scenes + wrong)
    assert 0.2 < sum(a != b for a, b in zip(scenes, wrong, strict=True)) / 500 < 0.6
    assert corrupt(scenes[0], 0.0, rng) == scenes[0]


def test_the_script_makes_a_folder_that_loads(tmp_path: Path):
    config = PretrainConfig(
        out=tmp_path / "model",
        clip_out=tmp_path / "clip",
        scenes=64,
        clip_steps=1,
        vae_steps=1,
        flow_steps=1,
        flow_batch=8,
    )
    main(config)
    model = FlowModel(str(config.out), "fp32", torch.device("cpu"))
    model.add_lora(4, 8, 0)
    shipped, made = ({p.relative_to(root) for p in root.rglob("*")} for root in (TINY_MODEL, config.out))
    assert shipped <= made
    assert (tmp_path / "clip" / "model.safetensors").is_file()
