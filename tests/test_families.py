"""Every family of base models against its own stock pipeline: text, velocity, grid, guidance, decoding, LoRA; what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import bases as sizes
import pytest
import torch
from conftest import CPU, FAMILIES, loaded, moved
from diffusers import Flux2Transformer2DModel, SD3Transformer2DModel, ZImageTransformer2DModel
from test_model import SD35_MEDIUM_TRANSFORMER
from test_training import small

from fdfo.config.errors import UserError
from fdfo.config.plan import plan_batches
from fdfo.config.presets import PRESETS
from fdfo.config.train_options import SampleConfig
from fdfo.distributed.job import Job
from fdfo.method.estimator import pair_deviation
from fdfo.method.prepare import load_model
from fdfo.method.rollout import Differences, PairShare, sample_share
from fdfo.method.sampling import sample_flow
from fdfo.method.update import EpochData, micro_batch_loss
from fdfo.model.families.base import Family, even_levels
from fdfo.model.families.flux2_klein import Flux2Klein
from fdfo.model.families.registry import family_of_layers, find_family
from fdfo.model.families.sd3 import StableDiffusion3
from fdfo.model.families.z_image import ZImage
from fdfo.model.flow_model import FlowModel
from fdfo.model.memory import fits
from fdfo.model.text import joined

PROMPTS = ["a red ring", "a blue ring above a green cross on a black background, and a few words more"]
LARGE = SD35_MEDIUM_TRANSFORMER | dict(
    num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, dual_attention_layers=()
)
KLEIN = dict(in_channels=128, guidance_embeds=False)


# -- against the stock pipeline


@pytest.mark.parametrize("resolution", [64, 96])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_without_churn_it_is_the_stock_pipeline(bases: dict[str, str], name: str, resolution: int):
    """On the same noise and the same number of steps, with and without guidance: largest difference under 1e-4 of the deviation."""
    model = loaded(bases[name])
    noise = torch.randn(2, *model.latent_shape(resolution), generator=torch.Generator().manual_seed(1))
    text, empty, images = model.encode(PROMPTS), model.encode([""]), []
    for guidance in (1.0, 3.0):
        length = model.family.text_length(model.family.training_text)
        size = dict(height=resolution, width=resolution, max_sequence_length=length)
        expected = model.pipe(
            prompt=list(PROMPTS), latents=noise, num_inference_steps=5, guidance_scale=guidance + model.family.guidance_offset,
            output_type="pt", **size, **({} if name == "sd3" else {"sigmas": even_levels(5)}),
        ).images  # fmt: skip
        final = sample_flow(model.velocity_at(text, empty, guidance), noise, model.sigmas(5, resolution))
        images.append(model.decode(final))
        assert (images[-1] - expected).abs().max() < 1e-4 * expected.std()
    assert (images[0] - images[1]).abs().max() > 0.1 * images[0].std()  # guidance does something


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_does_not_depend_on_its_batch(bases: dict[str, str], name: str):
    model = loaded(bases[name])
    x, sigma = torch.randn(4, *model.latent_shape(64)), torch.tensor([0.9, 0.6, 0.3, 0.1])
    text, empty = model.encode([*PROMPTS, "", "x" * 300]), model.encode([""])
    with torch.no_grad():
        together = model.velocity(x, sigma, text, empty, 2.0)
        alone = [model.velocity(x[i : i + 1], sigma[i : i + 1], text.rows([i]), empty, 2.0) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=2e-5)
    again = joined([text.rows(slice(0, 2)), model.encode(["", "x" * 300])])
    assert torch.equal(again.tokens, text.tokens) and (again.lengths is None or torch.equal(again.lengths, text.lengths))


def test_the_grids_are_those_of_the_true_schedulers(bases: dict[str, str]):
    """docs/bases.md: klein's shift depends on the number of image tokens and of steps, Z-Image's does not."""
    klein, z_image = loaded(bases["klein"]), loaded(bases["z_image"])
    expected = [1, 0.9850, 0.9669, 0.9445, 0.9163, 0.8795, 0.8295, 0.7578, 0.6460, 0.4478, 0]
    torch.testing.assert_close(klein.sigmas(10, 512), torch.tensor(expected), rtol=0, atol=6e-5)
    expected = [1, 0.9818, 0.9600, 0.9333, 0.9000, 0.8571, 0.8000, 0.7200, 0.6000, 0.4000, 0]
    torch.testing.assert_close(z_image.sigmas(10, 512), torch.tensor(expected), rtol=0, atol=6e-5)
    assert klein.sigmas(10, 1024)[5] > klein.sigmas(10, 512)[5] and torch.equal(z_image.sigmas(10, 64), z_image.sigmas(10, 512))


# -- sampling and update


@pytest.mark.parametrize("precision,tolerance", [("fp32", 1e-3), ("bf16", 1e-2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_ratio_at_unchanged_weights_is_one(
    bases: dict[str, str], tmp_path: Path, name: str, precision: str, tolerance: float
):
    """Of all samples, sampled 4 rows at a time and trained on 5 or 3 at a time, in an order that mixes the prompts."""
    model, prompts = moved(bases[name], precision), [*PROMPTS, "two words", "", "a green square"]
    config = small(tmp_path, sample=SampleConfig(4, 2.0, 64), total_pairs_per_epoch=5, max_batch_size=5)
    plan = dataclasses.replace(plan_batches(config, 1), sample_batch=2)
    share = PairShare(0, range(5), prompts, *model.encode_prompts(prompts, 2.0))
    rollout = sample_share(model, config, plan, share)
    dR = torch.tensor([1.0, -1.0]).repeat(5)
    differences = Differences(pair_deviation(rollout.final), dR, dR, {}, torch.zeros(10, dtype=torch.bool))
    data, sigmas, order = EpochData(model, config, plan, rollout, differences), model.sigmas(4, 64), torch.randperm(40)
    for rows in (5, 3):
        ratio = torch.cat([micro_batch_loss(data, sigmas, batch)[1] for batch in order.split(rows)])
        assert len(ratio) == 40 and (ratio - 1).abs().max() < tolerance, (ratio - 1).abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_of_one_size_and_checkpointing_change_nothing(bases: dict[str, str], name: str):
    """As where blocks are compiled: 5 rows of texts of unlike lengths as 2 + 2 + 1 padded, in sampling and in training alike."""
    model = moved(bases[name])
    text = model.encode([*PROMPTS, "", "two words", "a green square"])
    x, sigma, results = torch.randn(5, *model.latent_shape(64)), torch.rand(5), []
    for rows, checkpointed in ((None, False), (2, False), (2, True)):
        if checkpointed:
            model.checkpoint_gradients()
        model.compiled_rows = rows
        with torch.no_grad():
            sampled = model.velocity(x, sigma, text, None, 1.0)
        v = model.velocity(x, sigma, text, None, 1.0)
        v.square().sum().backward()
        assert torch.equal(sampled, v)
        # Every module learns; the published list has one that cannot, since SD3 drops the text of its last block.
        idle = {name.partition(".lora_")[0] for name, p in model.named_trainable() if p.grad.abs().max() == 0}
        assert idle <= {f"transformer_blocks.{len(model.family.blocks()) - 1}.attn.add_q_proj"} and (name == "sd3" or not idle)
        results.append((v.detach(), torch.cat([p.grad.flatten() for p in model.trainable()])))
        for parameter in model.trainable():
            parameter.grad = None
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
    assert all(torch.equal(one, two) for one, two in zip(results[2], results[1], strict=True))


def test_the_trial_before_the_first_epoch_has_a_long_text(bases: dict[str, str], job: Job, tmp_path: Path):
    model = moved(bases["z_image"])
    text = model.encode([""])
    assert int(model.long_text(text).lengths) > 4 * int(text.lengths)
    config = small(tmp_path)
    assert fits(job, config, model, plan_batches(config, 1))


# -- LoRA


@pytest.mark.parametrize(
    "family,network,config,modules,parameters",
    [
        (StableDiffusion3, SD3Transformer2DModel, LARGE, 303, 47.2),
        (Flux2Klein, Flux2Transformer2DModel, sizes.KLEIN_4B | KLEIN, 80, 37.4),
        (Flux2Klein, Flux2Transformer2DModel, sizes.KLEIN_9B | KLEIN, 112, 64.0),
        (ZImage, ZImageTransformer2DModel, sizes.Z_IMAGE, 120, 29.5),
    ],
    ids=["SD3.5 Large", "klein 4B", "klein 9B", "Z-Image"],
)
def test_lora_at_true_size(family: type[Family], network: type, config: dict, modules: int, parameters: float):
    with torch.device("meta"):
        model = FlowModel.__new__(FlowModel)
        model.name, model.peft, model.family = (
            "the true size",
            None,
            family(type("Pipe", (), {"transformer": network(**config)})()),
        )
        model.add_lora(32, 64, 0)
    assert len(model.lora_targets) == modules == len(model.trainable()) // 2
    assert sum(p.numel() for p in model.trainable()) / 1e6 == pytest.approx(parameters, abs=0.05)
    assert family_of_layers(model.lora_targets) is family
    assert not any("refiner" in name or "attn2" in name or "ff" in name for name in model.lora_targets)


# -- what is refused, and what is warned of


def test_a_pipeline_of_another_class_is_refused_before_it_is_loaded(tmp_path: Path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="is a FluxPipeline.*StableDiffusion3Pipeline, Flux2KleinPipeline, ZImagePipeline"):
        FlowModel(str(tmp_path), "fp32", CPU)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be loaded"):
        find_family(str(tmp_path))


@pytest.mark.parametrize("name", ["klein", "z_image"])
def test_float16_is_refused_where_it_overflows(bases: dict[str, str], name: str):
    with pytest.raises(UserError, match="--precision fp16 overflows in .*: give --precision bf16"):
        find_family(bases[name]).check_precision("fp16", bases[name])


def test_a_distilled_model_is_warned_of(bases: dict[str, str], job: Job, tmp_path: Path, capsys: pytest.CaptureFixture):
    def warned(name: str) -> bool:
        load_model(job, small(tmp_path, pretrained_model=name), None)
        return "is distilled to few steps" in capsys.readouterr().out

    for name, changes in (("klein", dict(distilled=True)), ("z_image", dict(shift=3.0))):
        distilled = sizes.save(getattr(sizes, f"tiny_{name}")(**changes), tmp_path / name)
        assert warned(str(distilled)) and not warned(bases[name])
    assert not warned("tiny") and loaded("tiny").family.distilled("stabilityai/stable-diffusion-3.5-large-turbo")


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_of_another_family_is_refused_by_name(bases: dict[str, str], tmp_path: Path, name: str):
    model = moved(bases[name])
    model.peft.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "x", ignore_errors=True)
    for other in {*FAMILIES} - {name}:
        victim = loaded(bases[other])
        says = f"is one of {model.family.title}, .* is {victim.family.title}"
        for seed in (None, 0):
            with pytest.raises(UserError, match=says):
                victim.load_adapter(tmp_path, seed)
    loaded(bases[name]).load_adapter(tmp_path)


def test_the_presets_fit_their_families():
    for name, family in (("sd35-large", StableDiffusion3), ("flux2-klein", Flux2Klein), ("z-image", ZImage)):
        preset = PRESETS[name]
        assert preset.preset == name and preset.pretrained_model in family.licences
        family.check_precision(preset.precision, name)
        assert plan_batches(preset, 1).samples == 2 * 432 * preset.sample.num_solver_steps
