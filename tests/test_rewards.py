"""Scorers against their definitions (docs/method.md 5), the weighted sum, and rewards that do not work."""

import random
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from fdfo.config.errors import UserError
from fdfo.evaluation.health import check_first_scores
from fdfo.tiny import SCENE_CLIP
from fdfo.tiny.architecture import build_clip_tokenizer
from fdfo.tiny.scenes import COLOURS, RELATIONS, SHAPES, Scene, all_scenes, render
from rewards.registry import build_scorers, reward_weights
from rewards.scorer import WeightedReward
from rewards.scorers.clip import CLIP_MODELS, ClipScorer
from rewards.scorers.scene import SceneScorer


def scenes(n: int) -> list[Scene]:
    return random.Random(0).sample(all_scenes(), n)


def test_true_renderings_score_high_and_foreign_captions_low():
    drawn = scenes(128)
    images = render(drawn, torch.Generator().manual_seed(0))
    captions = [scene.caption() for scene in drawn]
    scores = SceneScorer().score(captions, images)
    assert scores.dtype == torch.float32 and scores.shape == (128,)
    assert scores.mean() > 95 and scores.min() >= 0 and scores.max() <= 100
    assert SceneScorer().score(captions[1:] + captions[:1], images).mean() < 20
    quantised = SceneScorer().score(captions, (255 * images).round().to(torch.uint8))
    torch.testing.assert_close(quantised, scores, rtol=0, atol=1.0)


@pytest.mark.parametrize("fact", ["background", "colour", "shape", "relation"])
def test_every_fact_of_a_caption_counts(fact: str):
    scene = Scene("white", (("red", "circle"), ("blue", "square")), "left of")
    image = render([scene], torch.Generator().manual_seed(0))
    changed = {
        "background": Scene("black", scene.objects, scene.relation),
        "colour": Scene("white", (("green", "circle"), ("blue", "square")), "left of"),
        "shape": Scene("white", (("red", "cross"), ("blue", "square")), "left of"),
        "relation": Scene("white", scene.objects, "right of"),
    }[fact]
    true, false = SceneScorer().score([scene.caption(), changed.caption()], image.repeat(2, 1, 1, 1)).tolist()
    assert true > 95 and false < 80


def test_every_shape_is_told_from_every_other():
    for shape in SHAPES:
        image = render([Scene("white", (("red", shape),))], torch.Generator().manual_seed(1)).repeat(5, 1, 1, 1)
        scores = SceneScorer().score([f"a red {other} on a white background" for other in SHAPES], image)
        assert SHAPES[int(scores.argmax())] == shape and scores.sort().values[-2] < 60
    assert len(COLOURS) == 8 and len(RELATIONS) == 4


def test_blank_and_noise_pictures_score_finitely():
    caption = "a red circle above a blue ring on a white background"
    for images in (torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64), torch.rand(1, 3, 64, 64)):
        score = SceneScorer().score([caption], images)
        assert score.isfinite().all() and score < 40


def test_scene_scorer_names_the_grammar():
    with pytest.raises(ValueError, match="COLOUR SHAPE on a COLOUR background"):
        SceneScorer().score(["a dog on a sofa"], torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_clip_scorer_is_transformers_own_logit(kind: torch.dtype):
    drawn = scenes(70)
    captions = [scene.caption() for scene in drawn]
    images = render(drawn, torch.Generator().manual_seed(0))
    images = (255 * images).round().to(torch.uint8) if kind == torch.uint8 else images
    model = CLIPModel.from_pretrained(SCENE_CLIP, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(SCENE_CLIP)
    inputs = processor(text=captions, images=list(images), padding=True, return_tensors="pt", do_rescale=kind == torch.uint8)
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal()
    torch.testing.assert_close(ClipScorer(*CLIP_MODELS["scene_clip"]).score(captions, images), expected, rtol=0, atol=1e-4)


ODD_CAPTIONS = ["", "a cat 🐈", " ".join(["word"] * 300), 'braces {0} {{x}} "quotes"\nand lines', "a red circle"]


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_any_clip_model_scores_any_caption(tmp_path: Path, kind: torch.dtype):
    """A random CLIPModel with a CLIP tokenizer and image size of its own, long and odd captions, images that are not square."""
    tokenizer = build_clip_tokenizer()
    tokenizer.model_max_length = 24
    torch.manual_seed(1)
    text = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=16)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path)
    sizes = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    CLIPProcessor(image_processor=sizes, tokenizer=tokenizer).save_pretrained(tmp_path)
    images = torch.rand(len(ODD_CAPTIONS), 3, 70, 90, generator=torch.Generator().manual_seed(0))
    images = (255 * images).round().to(torch.uint8) if kind == torch.uint8 else images
    model, processor = CLIPModel.from_pretrained(tmp_path).eval(), CLIPProcessor.from_pretrained(tmp_path)
    inputs = processor(text=ODD_CAPTIONS, images=list(images), padding=True, truncation=True, max_length=24, return_tensors="pt",
                       do_rescale=kind == torch.uint8)  # fmt: skip
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal()
    assert expected.std() > 1e-3
    torch.testing.assert_close(ClipScorer(str(tmp_path), str(tmp_path)).score(ODD_CAPTIONS, images), expected, rtol=0, atol=1e-4)


def test_scene_clip_prefers_the_true_caption():
    drawn = scenes(64)
    captions = [scene.caption() for scene in drawn]
    images, scorer = render(drawn, torch.Generator().manual_seed(0)), ClipScorer(*CLIP_MODELS["scene_clip"])
    assert scorer.score(captions, images).mean() > scorer.score(captions[1:] + captions[:1], images).mean() + 10


def test_presets_and_specs(job):
    assert reward_weights("combined", ()) == {"pickscore": 1.0, "vlm_alignment_train": 0.1}
    assert reward_weights("combined", ("scene=0.5", "scene_clip=2")) == {"scene": 0.5, "scene_clip": 2.0}
    for preset, specs in (("nothing", ()), ("scene", ("scene",)), ("scene", ("scene=x",)), ("scene", ("nothing=1",)),
                          ("scene", ("no_module:C=1",)), ("scene", ("math:C=1",)), ("scene", ("scene=nan",)), ("scene", ("dreamsim_diversity=1",)), ("scene", ("scene=1", "scene=2"))):  # fmt: skip
        with pytest.raises(UserError):
            reward_weights(preset, specs)


def test_weighted_sum(job):
    captions = [scene.caption() for scene in scenes(4)]
    images = torch.rand(4, 3, 64, 64)
    weights = {"scene": 0.5, "scene_clip": 2.0}
    reward = WeightedReward(weights, build_scorers(weights, job))
    scores = reward.score(captions, images)
    torch.testing.assert_close(reward.total(scores), 0.5 * scores["scene"] + 2 * scores["scene_clip"])


class Broken:
    """A scorer that breaks the contract: one number for all images."""

    def __init__(self, device: torch.device):
        pass

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        return images.mean()


def test_a_scorer_that_breaks_the_contract_is_named():
    reward = WeightedReward({"mine": 1.0}, {"mine": Broken(torch.device("cpu"))})
    with pytest.raises(UserError, match="mine returned"):
        reward.score(["a", "b"], torch.rand(2, 3, 8, 8))


def test_first_scores_must_be_finite_and_differ():
    check_first_scores({"scene": [1.0, 2.0]})
    with pytest.raises(UserError, match="flat gave all 3 images the same score"):
        check_first_scores({"scene": [1.0, 2.0], "flat": [5.0] * 3})
    with pytest.raises(UserError, match="holes gave 1 of 2 images a score that is not finite"):
        check_first_scores({"holes": [1.0, float("nan")]})
