"""docs/method.md names functions that exist; the code on docs/rewards.md runs."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, ROOT
from test_training import log_of, small
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from fdfo.config.errors import UserError
from fdfo.config.tool_options import MetricsConfig
from fdfo.config.train_options import TrainConfig
from fdfo.distributed.job import Job
from fdfo.method.trainer import train
from fdfo.model.families.base import Family
from fdfo.model.families.registry import FAMILIES
from rewards.registry import build_scorer
from rewards.scorer import check_prompts

METHOD, REWARDS, BASES = ((ROOT / "docs" / name).read_text() for name in ("method.md", "rewards.md", "bases.md"))
NAMED = sorted(set(re.findall(r"`([\w/]+)\.py: ([\w.]+)`", METHOD)))
MODULES = ("compressibility", "classifier", "colour", "contrast", "judge_server")  # as the page names its code blocks
SPECS = {"compressibility": "Compressibility", "classifier": "Classifier", "colour": "NamedColour"}


def test_the_method_page_names_functions_that_exist():
    assert len(NAMED) > 50
    for module, name in NAMED:
        found = importlib.import_module(module.replace("/", "."))
        for part in name.split("."):
            found = getattr(found, part)


def test_the_page_of_bases_names_all_of_the_interface():
    part = BASES.partition("A family gives")[2].partition("Three that are not built")[0]
    named = set(re.findall(r"^\| (.*?) \|", part, re.MULTILINE)) - {"part", "---"}
    named = {name for cell in named for name in re.findall(r"`(\w+)`", cell)}
    assert named <= set(vars(Family)) | set(Family.__annotations__) and len(named) > 12
    for kind, name in re.findall(r"`(StableDiffusion3|Flux2Klein|ZImage)\.(\w+)`", BASES):
        assert any(name in vars(family) for family in FAMILIES.values() if family.__name__ == kind)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's modules, importable; a small random classifier stands for the one on the hub."""
    vit = tmp_path / "vit"
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**shape, num_labels=300)).save_pretrained(vit)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(vit)
    blocks = re.findall(r"^```python\n(.*?)^```", REWARDS, re.MULTILINE | re.DOTALL)
    for name, block in zip(MODULES, blocks, strict=True):
        assert f"`{name}.py`" in REWARDS
        (tmp_path / f"{name}.py").write_text(block.replace("google/vit-base-patch16-224", str(vit)))
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_rewards_of_the_page_score_pictures(page: Path, job: Job):
    quantised = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    quantised[0] = 128
    prompts = ["a red ring on a blue background"] * 5
    for module, name in SPECS.items():
        scorer = build_scorer(f"{module}:{name}", job)
        scores = scorer.score(prompts, quantised)
        assert scores.shape == (5,) and scores.isfinite().all() and scores.std() > 0
        torch.testing.assert_close(scorer.score(prompts, quantised.float() / 255), scores, rtol=1e-4, atol=1e-4)
        if module == "compressibility":
            assert scores.argmax() == 0
    with pytest.raises(UserError, match="names none of red, green, blue"):
        check_prompts({"colour": scorer}, ["a mauve ring"])
    assert scorer.score(["red", "blue"], torch.tensor([0.9, 0.1, 0.1]).expand(2, 8, 8, 3).permute(0, 3, 1, 2)).tolist()[0] == 100


@pytest.mark.parametrize("module", ["compressibility", "classifier"])
def test_the_rewards_of_the_page_train(page: Path, job: Job, tmp_path: Path, module: str):
    run = train(job, small(tmp_path / "runs", reward_specs=(f"{module}:{SPECS[module]}=1.0",)))
    (epoch,) = log_of(run.folder, "epoch")
    assert epoch["differing_pairs"] > 0.5 and epoch["warnings"] == []


def test_the_judge_of_the_page_trains(page: Path, job: Job, tmp_path: Path):
    run = train(job, small(tmp_path / "runs", reward_specs=("contrast:MoreContrast=1.0",)))
    (epoch,) = log_of(run.folder, "epoch")
    assert epoch["differing_pairs"] > 0.1 and epoch["warnings"] == []


def test_the_pages_name_flags_that_exist():
    flags = {flag for text in (METHOD, REWARDS, BASES) for flag in re.findall(r"--([a-z][\w.-]*[a-z])", text)}
    known = {name.replace("_", "-") for name in TrainConfig.__dataclass_fields__}
    metrics = {name.replace("_", "-") for name in MetricsConfig.__dataclass_fields__}
    own = {flag.partition(".")[0].removeprefix("no-") for flag in flags} - {"nproc_per_node"}
    assert own <= known | metrics | {"port"}  # of rewards.serve


def test_the_offloaded_classifier_scores_alike(page: Path, job: Job):
    from rewards.scorer import Offload

    scorer, images = build_scorer("classifier:Classifier", job), torch.rand(3, 3, 64, 64)
    offloaded = Offload(CPU)(scorer)
    assert offloaded is not scorer and torch.equal(offloaded.score(["a"] * 3, images), scorer.score(["a"] * 3, images))
