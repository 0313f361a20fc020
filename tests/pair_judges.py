"""Judges of pairs of one's own, as --reward-specs pair_judges:NAME=1 loads them."""

import os
import zlib

import torch

from rewards.scorers.scene import SceneScorer


class SceneDifference:
    """The difference of the two scene scores, over 100: what `scene` with weight 0.01 gives as R1 - R2."""

    def __init__(self, device: torch.device):
        self.scene = SceneScorer(device)

    def check_prompts(self, prompts: list[str]) -> None:
        self.scene.check_prompts(prompts)

    def compare(self, prompts: list[str], first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (self.scene.score(prompts, first) - self.scene.score(prompts, second)) / 100


class ScenePerson(SceneDifference):
    """Somebody who chooses the better scene, calls equal ones a tie, and is wrong about a share of the others (WRONG, 0.1)."""

    def compare(self, prompts: list[str], first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        choices = super().compare(prompts, first, second).sign()
        draws = [zlib.crc32(image.cpu().numpy().tobytes()) / 2**32 for image in first]
        wrong = torch.tensor(draws, device=choices.device) < float(os.environ.get("WRONG", 0.1))
        return torch.where(wrong, -choices, choices)


class LeavesOut(SceneDifference):
    """Has no opinion on every third pair."""

    def compare(self, prompts: list[str], first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return super().compare(prompts, first, second).index_fill(0, torch.arange(0, len(prompts), 3), float("nan"))


class AlwaysTie(SceneDifference):
    def compare(self, prompts: list[str], first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(prompts))


class TooSure(SceneDifference):
    def compare(self, prompts: list[str], first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.full((len(prompts),), 1.5)


class OneForAll(SceneDifference):
    def compare(self, prompts: list[str], first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.ones(2, len(prompts))
