"""Scorers that take turns on the GPU: their models wait in pinned host memory and are on the device while they score."""

import torch
from torch import nn

from fdfo.acceleration import PinnedWeights


class OffloadedScorer:
    """A scorer whose model is on the device only while it scores; in all else it is the scorer itself. The scores are the same."""

    def __init__(self, scorer: object, weights: PinnedWeights):
        self.scorer, self.weights = scorer, weights

    def __getattr__(self, name: str) -> object:
        return getattr(self.scorer, name)

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        """As the scorer itself: prompts [N], images [N, 3, H, W] -> [N] float32."""
        with self.weights.loaded():
            return self.scorer.score(prompts, images)

    def score_sets(self, images: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """As the set scorer itself: images [N, 3, H, W], counts [P] -> [P] float32."""
        with self.weights.loaded():
            return self.scorer.score_sets(images, counts)


class Offload:
    """Sends scorers' models to host memory, each model once, however many scorers share it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.waiting: dict[nn.Module, PinnedWeights] = {}

    def __call__(self, scorer: object) -> object:
        """The scorer, offloaded where it has a `model`, a module whose parameters are all on the device."""
        model = getattr(scorer, "model", None)
        if not isinstance(model, nn.Module):
            return scorer
        if model not in self.waiting:
            if any(parameter.device != self.device for parameter in model.parameters()):
                return scorer
            self.waiting[model] = PinnedWeights([model], self.device)
        return OffloadedScorer(scorer, self.waiting[model])
