"""Paired, churned sampling of the flow (docs/method.md 1 and 2). Pure functions of tensors; all noise is an argument."""

import math
from collections.abc import Callable

import torch

# Of log(1 + gamma). A branch keeps exp(-16) of what it shared, float32's last digit. Above 16.6, 1 + gamma is gamma in float32.
MOST_CHURN = 16.0


def churn_step(
    x: torch.Tensor, v: torch.Tensor, sigma: float, sigma_next: float, gamma: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Take one solver step from sigma to sigma_next with fresh noise of relative amount gamma (docs/method.md 2).

    x, v, noise [N, C, H, W]; sigma, sigma_next in [0, 1]; gamma [N] >= 0 -> [N, C, H, W]. gamma = 0 is the Euler step.
    """
    s = sigma_next
    gamma = gamma[:, None, None, None]  # [N, 1, 1, 1]
    r = s / (1 + gamma - gamma * s)  # overshoot: less noise than s
    y = x + (r - sigma) * v
    churn = (gamma * (2 + gamma)).sqrt()  # sqrt((1 + gamma)^2 - 1) without its cancellation
    return y / (1 + gamma * r) + noise * (r * churn / (1 + gamma * r))


def raw_gammas(sigmas: torch.Tensor, pairs: int, weight: float) -> torch.Tensor:
    """Return the same churn at every grid point (docs/method.md 2, raw): sigmas [T + 1] -> [P, T + 1], last column 0."""
    gammas = sigmas.new_full((pairs, len(sigmas)), weight)
    gammas[:, -1] = 0
    return gammas


def churn_weights(weight_normal: torch.Tensor, weight: float, weight_sd: float) -> torch.Tensor:
    """Return the churn weight of each pair (docs/method.md 2): standard normal draws [P] -> [P] float64."""
    return weight * (weight_sd * weight_normal.double()).exp()


def churn_amount(exponents: torch.Tensor) -> torch.Tensor:
    """Return gamma = exp(w) - 1 (docs/method.md 2), for w of any shape, at most MOST_CHURN of it."""
    return exponents.clamp(max=MOST_CHURN).expm1()


def interval_gammas(sigmas: torch.Tensor, centres: torch.Tensor, weights: torch.Tensor, soft_sd: float) -> torch.Tensor:
    """Return churn around one noise level per pair, spread as a logit-normal density (docs/method.md 2, interval).

    sigmas [T + 1]; centres [P] float64, on the logit scale; weights [P] of churn_weights -> [P, T + 1], last column 0.
    """
    grid = sigmas[:-1].double()  # [T]
    inside = (grid > 0) & (grid < 1)
    level = torch.where(inside, grid, torch.full_like(grid, 0.5))
    z = (level.logit() - centres[:, None]) / soft_sd  # [P, T]
    density = (-0.5 * z.square()).exp() / (soft_sd * math.sqrt(2 * math.pi) * level * (1 - level))
    density = torch.where(inside, density, torch.zeros_like(density))
    total = density.sum(dim=1, keepdim=True)  # [P, 1]
    p = torch.where(total > 1e-6, density / total.clamp(min=1e-6), torch.full_like(density, 1 / len(grid)))
    return _with_landing(churn_amount(weights[:, None] * p), sigmas)


def prior_gammas(sigmas: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return all churn in the starting noise (docs/method.md 2, prior): sigmas [T + 1], weights [P] of churn_weights -> [P, T + 1]."""
    gammas = weights.new_zeros(len(weights), len(sigmas) - 1)  # [P, T]
    gammas[:, 0] = churn_amount(weights)
    return _with_landing(gammas, sigmas)


def _with_landing(gammas: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Append the landing on sigma 0, where nothing is added, in the type of sigmas: [P, T] -> [P, T + 1]."""
    return torch.nn.functional.pad(gammas, (0, 1)).to(sigmas)


def sample_pairs(
    velocity: Callable[[torch.Tensor, float], torch.Tensor],
    x_init: torch.Tensor,
    sigmas: torch.Tensor,
    gammas: torch.Tensor,
    noise: Callable[[int], torch.Tensor],
    keep: Callable[[int, torch.Tensor, torch.Tensor], None],
) -> torch.Tensor:
    """Sample both branches of every pair from the same start; only churn parts them (docs/method.md 2).

    velocity(x [2P, C, H, W], sigma) -> v; x_init [P, C, H, W]; sigmas [T + 1] falling from 1 to 0; gammas [P, T + 1];
    noise(step) -> [2P, C, H, W], step 0 for the start, step i + 1 for the step that lands on grid point i + 1; keep(i, x, v) is
    called before the step from grid point i, with the latents there and the network's v -> final latents, at sigma 0
    [2P, C, H, W]. Rows 2k and 2k + 1 are the branches of pair k.
    """
    grid = sigmas.tolist()
    gammas = gammas.to(x_init.device).repeat_interleave(2, dim=0)  # [2P, T + 1]
    x = x_init.repeat_interleave(2, dim=0)  # [2P, C, H, W]
    x = churn_step(x, torch.zeros_like(x), 1.0, 1.0, gammas[:, 0], noise(0))
    for i, (sigma, sigma_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        v = velocity(x, sigma).to(x.dtype)
        keep(i, x, v)
        x = churn_step(x, v, sigma, sigma_next, gammas[:, i + 1], noise(i + 1))
    return x


def noised(x0: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Noise clean latents to some levels (docs/method.md 1): x0, noise [N, C, H, W], sigma [N] in [0, 1] -> [N, C, H, W]."""
    sigma = sigma[:, None, None, None]  # [N, 1, 1, 1]
    return (1 - sigma) * x0 + sigma * noise


def sample_flow(velocity: Callable[[torch.Tensor, float], torch.Tensor], x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Sample the flow without churn (docs/method.md 1): Euler steps from noise x [N, C, H, W] down the grid sigmas [T + 1] -> [N, C, H, W].

    velocity(x [N, C, H, W], sigma) -> v.
    """
    grid = sigmas.tolist()
    for sigma, sigma_next in zip(grid[:-1], grid[1:], strict=True):
        x = x + (sigma_next - sigma) * velocity(x, sigma).to(x.dtype)
    return x
