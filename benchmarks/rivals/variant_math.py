"""What FDFO's variants compute: deviations, directions, weights. Pure functions."""

import numpy as np
import torch

from fdfo.method.estimator import pair_deviation


def deviation(values: torch.Tensor, group: int) -> torch.Tensor:
    """Return each value's deviation from the mean of its group, which lies together: [N, ...] -> [N, ...]."""
    if group == 2:
        return pair_deviation(values)
    grouped = values.unflatten(0, (-1, group))  # [N / group, group, ...]
    return (grouped - grouped.mean(1, keepdim=True)).flatten(0, 1)


def best_and_worst(rewards: torch.Tensor, group: int) -> torch.Tensor:
    """Return the rows of the highest and the lowest reward of each group, in the order of rows: [N] -> [2 N / group] int64."""
    order = rewards.view(-1, group).argsort(dim=1, stable=True)  # of equals, the first and the last
    ends = order[:, [0, -1]].sort(1).values
    return (ends + group * torch.arange(len(ends), device=ends.device)[:, None]).flatten()


def noise_weights(grid: torch.Tensor, power: float) -> torch.Tensor:
    """Return the weight of each solver step: grid [T + 1] from 1 to 0 -> [T] with mean 1. A power above 0 favours high noise."""
    sigma = grid[:-1].double()
    weights = sigma**power if power >= 0 else (1 - sigma) ** -power
    return (weights / weights.mean()).float()


def gain_probabilities(means: np.ndarray, power: float) -> np.ndarray:
    """Return how likely each prompt is drawn: its mean reward [P], of at most 100, NaN if there is none -> [P] with sum 1."""
    seen = ~np.isnan(means)
    filled = np.where(seen, means, means[seen].mean() if seen.any() else 0.0)
    weights = (101 - filled) ** power
    return weights / weights.sum()
