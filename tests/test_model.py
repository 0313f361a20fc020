"""The model wrapper: what the LoRA binds to, its file, text length, decoding, and adapters that do not fit."""

import json
import math
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from fdfo.config.errors import UserError
from fdfo.config.options import to_json
from fdfo.config.plan import ImageSettings
from fdfo.config.train_options import TrainConfig
from fdfo.method.learner import Learner
from fdfo.model.families.sd3 import LORA_TARGETS, StableDiffusion3
from fdfo.model.flow_model import FlowModel
from fdfo.model.images import draw_images, encode_for_images
from fdfo.run_folder.save_checkpoint import save_checkpoint

CPU = torch.device("cpu")
SD35_MEDIUM_TRANSFORMER = dict(  # the published config.json of the transformer
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
    num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
    pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
)  # fmt: skip


def test_lora_of_sd35_medium_has_191_modules():
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**SD35_MEDIUM_TRANSFORMER)
        model = FlowModel.__new__(FlowModel)  # the wrapper around a transformer of the true size, without weights
        model.name, model.peft = "SD3.5 Medium", None
        model.family = StableDiffusion3(type("Pipe", (), {"transformer": transformer})())
        model.add_lora(32, 64, 0)
    assert len(model.lora_targets) == 191
    assert sum(p.numel() for p in model.trainable()) == 18_776_064
    names = [name for name, _ in model.named_trainable()]
    assert not any("attn2" in name or "23.attn.to_add_out" in name for name in names)


def test_fresh_lora_changes_nothing_and_depends_on_the_seed_alone(tiny):
    x, text = torch.randn(2, 16, 8, 8), tiny.encode(["a red circle on a white background"] * 2)
    level = torch.tensor([0.7, 0.2])
    with torch.no_grad():
        before = tiny.velocity(x, level, text, None, 1.0)
        torch.manual_seed(123)
        tiny.add_lora(32, 64, seed=6)
        assert torch.equal(tiny.velocity(x, level, text, None, 1.0), before)
    other = FlowModel("tiny", "fp32", CPU)
    other.add_lora(32, 64, seed=6)
    first, second = tiny.adapter_state(), other.adapter_state()
    assert len(first) == 62 and all(torch.equal(first[name], second[name]) for name in first)
    assert all(p.requires_grad for p in tiny.trainable())
    assert sum(p.requires_grad for p in tiny.pipe.transformer.parameters()) == 62


def test_base_switches_the_adapter_off(tiny):
    x, level, text = torch.randn(1, 16, 8, 8), torch.tensor([0.5]), tiny.encode(["a red ring on a blue background"])
    with torch.no_grad():
        plain = tiny.velocity(x, level, text, None, 1.0)
        tiny.add_lora(4, 8, seed=0)
        for _, parameter in tiny.named_trainable():
            parameter.add_(0.1)
        assert not torch.allclose(tiny.velocity(x, level, text, None, 1.0), plain)
        with tiny.base():
            assert torch.equal(tiny.velocity(x, level, text, None, 1.0), plain)


def test_decode_is_the_pipelines_decode(tiny):
    latents = torch.randn(10, 16, 8, 8)
    scaled = latents / tiny.pipe.vae.config.scaling_factor + tiny.pipe.vae.config.shift_factor
    with torch.no_grad():
        expected = (tiny.pipe.vae.decode(scaled).sample / 2 + 0.5).clamp(0, 1)
    images = tiny.decode(latents)
    assert images.shape == (10, 3, 64, 64)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)


def test_text_is_padded_to_the_trained_length(tiny):
    assert tiny.family.text_length(128) == tiny.family.text_length(256) == 16
    assert tiny.encode(["a red circle on a white background"]).tokens.shape == (1, 32, 96)


def save(model: FlowModel, folder: Path) -> Path:
    learner = Learner.start(model, TrainConfig(precision="fp32"))
    learner.progress.epochs = 1
    (folder / "config.json").write_text(to_json(TrainConfig()))
    save_checkpoint(folder, TrainConfig(), model, learner.state())
    return folder / "checkpoints" / "epoch-0000001"


def test_adapter_file_loads_by_plain_peft_and_back(tiny, tmp_path: Path):
    tiny.add_lora(8, 16, seed=1)
    with torch.no_grad():
        for _, parameter in tiny.named_trainable():
            parameter.add_(0.02)
    folder = save(tiny, tmp_path)
    again = FlowModel("tiny", "fp32", CPU)
    again.load_adapter(folder)
    from peft import PeftModel

    plain = FlowModel("tiny", "fp32", CPU)
    PeftModel.from_pretrained(plain.pipe.transformer, folder)
    x, level, text = torch.randn(2, 16, 8, 8), torch.tensor([0.5, 0.9]), tiny.encode(["a red ring on a blue background"] * 2)
    with torch.no_grad():
        expected = tiny.velocity(x, level, text, None, 1.0)
        assert torch.equal(again.velocity(x, level, text, None, 1.0), expected)
        assert torch.equal(plain.velocity(x, level, text, None, 1.0), expected)


def saved_by_peft(folder: Path, **changes) -> FlowModel:
    """A model whose random LoRA plain PEFT has saved in the folder, with short target names."""
    model = FlowModel("tiny", "fp32", CPU)
    targets = [f"attn.{target}" for target in LORA_TARGETS]
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets, **changes)
    get_peft_model(model.pipe.transformer, config).save_pretrained(folder)
    return model


def draw_one(model: FlowModel) -> torch.Tensor:
    text = encode_for_images(model, ["a red ring on a blue background"])
    return next(draw_images(model, text, [0], [0], ImageSettings(width=64, height=64, steps=2, guidance=1.0, batch_size=1)))


def test_adapter_saved_by_plain_peft_loads(tiny, tmp_path: Path):
    """The published adapters: saved by PEFT, with short target names."""
    model = saved_by_peft(tmp_path)
    tiny.load_adapter(tmp_path)
    model.peft = True  # only to name its parameters
    for (_, ours), (_, theirs) in zip(tiny.named_trainable(), model.named_trainable(), strict=True):
        assert torch.equal(ours, theirs)


def test_adapters_that_do_not_fit_are_refused(tiny, tmp_path: Path):
    tiny.add_lora(4, 8, seed=0)
    folder = save(tiny, tmp_path)

    def refused(change, says: str) -> None:
        spoilt = tmp_path / "spoilt"
        shutil.rmtree(spoilt, ignore_errors=True)
        shutil.copytree(folder, spoilt)
        change(spoilt)
        with pytest.raises(UserError, match=says):
            FlowModel("tiny", "fp32", CPU).load_adapter(spoilt)

    def edit_config(**values):
        def change(spoilt: Path) -> None:
            path = spoilt / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | values))

        return change

    def edit_tensors(edit):
        def change(spoilt: Path) -> None:
            tensors = load_file(spoilt / "adapter_model.safetensors")
            edit(tensors)
            save_file(tensors, spoilt / "adapter_model.safetensors")

        return change

    refused(edit_config(target_modules=["nothing"]), "binds to no module")
    refused(edit_config(target_modules=["attn.to_q"]), "binds to 4 modules of tiny, the architecture has 31")
    refused(edit_config(target_modules=["attn2.to_q"]), "(?s)binds to 1 modules.*missing transformer_blocks")
    refused(edit_config(r=16), "does not fit tiny")
    refused(edit_tensors(lambda tensors: tensors.popitem()), "does not fit tiny")
    refused(edit_tensors(lambda tensors: tensors.update(stranger=torch.zeros(1))), "does not fit tiny")
    refused(edit_tensors(lambda tensors: next(iter(tensors.values())).fill_(math.nan)), "numbers that are not finite")
    refused(lambda spoilt: (spoilt / "adapter_model.safetensors").write_bytes(b"junk"), "cannot be read")
    refused(lambda spoilt: (spoilt / "adapter_config.json").write_text("{"), "adapter_config.json")
    refused(lambda spoilt: (spoilt / "adapter_config.json").unlink(), "holds no adapter")


def test_the_dropout_of_a_foreign_adapter_is_not_applied(tiny, tmp_path: Path):
    saved_by_peft(tmp_path, lora_dropout=0.5)
    tiny.load_adapter(tmp_path)
    assert torch.equal(draw_one(tiny), draw_one(tiny))


def test_pictures_that_are_not_finite_are_not_drawn_black(tiny):
    tiny.add_lora(4, 8, seed=0)
    with torch.no_grad():
        tiny.trainable()[1].fill_(math.nan)
    with pytest.raises(UserError, match="1 of 1 images are not finite: the adapter is damaged"):
        draw_one(tiny)


def test_long_prompts_are_told_of_once_and_not_repeated(tiny, caplog: pytest.LogCaptureFixture):
    diffusers.utils.logging.enable_propagation()
    try:
        for _ in range(3):
            tiny.encode(["a red ring on a blue background " * 20, "a red ring on a blue background"])
    finally:
        diffusers.utils.logging.disable_propagation()
    told = {id(record): record.getMessage() for record in caplog.records if record.name.startswith("diffusers")}
    assert len(told) <= 1 and not any("red ring" in text for text in told.values())


def test_models_that_cannot_be_had_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be loaded"):
        FlowModel(str(tmp_path), "fp32", CPU)
    with pytest.raises(UserError, match="accept its licence"):
        FlowModel("stabilityai/stable-diffusion-3.5-medium", "fp32", CPU)
    with pytest.raises(UserError, match="--preset tiny"):
        FlowModel("tiny", "fp16", CPU)


def test_resolutions_that_cannot_be_drawn(tiny):
    assert tiny.latent_shape(64) == (16, 8, 8)
    for resolution in (60, 256):
        with pytest.raises(UserError, match="multiple of 16 up to 128"):
            tiny.latent_shape(resolution)
