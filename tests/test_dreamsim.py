"""dreamsim_diversity: the package's own function, classes and preprocessing, on small random ViTs (docs/method.md 5)."""

from pathlib import Path

import dreamsim.feature_extraction.load_clip_as_dino as clip_loader
import dreamsim.feature_extraction.load_open_clip_as_dino as open_clip_loader
import pytest
import torch
from PIL import Image
from tiny_dreamsim import save_dreamsim, small_vit

import rewards.scorers.dreamsim
from fdfo.config.errors import UserError
from fdfo.distributed.job import Job
from rewards.scorers.dreamsim import DreamSimDiversity, mean_pair_distances


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> DreamSimDiversity:
    with pytest.MonkeyPatch.context() as patch:
        for loader in (clip_loader, open_clip_loader):
            patch.setattr(loader, "vit_base", small_vit)
        patch.setattr(rewards.scorers.dreamsim, "CACHE", tmp_path_factory.mktemp("hub") / "dreamsim")
        hub_folder = torch.hub.get_dir()
        save_dreamsim(rewards.scorers.dreamsim.CACHE)
        scorer = DreamSimDiversity(Job(0, 1, torch.device("cpu")))
        assert torch.hub.get_dir() == hub_folder
        return scorer


def pictures(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_value_is_twice_the_packages_own_distance(scorer: DreamSimDiversity):
    images = pictures(4)
    prepared = [scorer.preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images]
    with torch.no_grad():
        pairs = [2 * float(scorer.model(prepared[i], prepared[j])) for i in range(3) for j in range(i + 1, 3)]
    values = scorer.score_sets(images, [3, 1])
    assert values.shape == (2,) and values[1].isnan() and 0 < float(values[0]) < 4
    assert abs(float(values[0]) - sum(pairs) / 3) < 1e-4


def test_identical_pictures_score_zero_and_order_does_not_matter(scorer: DreamSimDiversity):
    images = pictures(3)
    assert float(scorer.score_sets(images[:1].repeat(3, 1, 1, 1), [3])) < 1e-9
    torch.testing.assert_close(scorer.score_sets(images, [3]), scorer.score_sets(images[[2, 0, 1]], [3]), rtol=0, atol=1e-5)


def test_sets_do_not_mix(scorer: DreamSimDiversity):
    images = pictures(5)
    both = scorer.score_sets(images, [2, 3])
    apart = torch.cat([scorer.score_sets(images[:2], [2]), scorer.score_sets(images[2:], [3])])
    torch.testing.assert_close(both, apart, rtol=0, atol=1e-5)


def test_pair_distances_by_hand():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 2.0], [1.0, 1.0], [1.0, 1.0], [7.0, 0.0]])
    values = mean_pair_distances(rows, [3, 2, 1])
    assert values[:2].tolist() == [(25 + 4 + 13) / 3, 0.0] and values[2].isnan()


def test_a_broken_download_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for loader in (clip_loader, open_clip_loader):
        monkeypatch.setattr(loader, "vit_base", small_vit)
    cache = tmp_path / "cache"
    monkeypatch.setattr(rewards.scorers.dreamsim, "CACHE", cache)
    save_dreamsim(cache)
    (cache / "dino_vitb16_pretrain.pth").write_bytes(b"half a file")
    with pytest.raises(UserError, match="delete"):
        DreamSimDiversity(Job(0, 1, torch.device("cpu")))
