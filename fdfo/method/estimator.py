"""The finite-difference estimator and its surrogate loss (docs/method.md 3 and 4). Pure functions of tensors."""

import torch


def pair_deviation(values: torch.Tensor) -> torch.Tensor:
    """Return each branch's deviation from its pair's mean (docs/method.md 3): interleaved [2P, ...] -> [2P, ...]."""
    first, second = values[0::2], values[1::2]  # [P, ...]
    half = (first - second) / 2
    return torch.stack([half, -half], dim=1).flatten(0, 1)


def surrogate_loss(
    v: torch.Tensor, v_ref: torch.Tensor, dx: torch.Tensor, dR: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the SPO surrogate of one (trajectory, step) sample per row (docs/method.md 4).

    v, v_ref, dx [N, C, H, W]; dR [N] -> loss [N], ratio rho [N], in float32 or better. Only v carries a gradient.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    v, v_ref, dx, dR = v.to(dtype), v_ref.detach().to(dtype), dx.detach().to(dtype), dR.detach().to(dtype)
    dims = (1, 2, 3)
    d = dx / (dx.square().mean(dims, keepdim=True) + 1e-6)  # [N, C, H, W]
    dv = v - v_ref
    # With v* = v_ref - d: mean((v - v*)^2) - mean(d^2) = mean(dv^2 + 2 dv d), without subtracting two large numbers.
    rho = torch.exp(-(dv.square() + 2 * dv * d).mean(dims))  # [N]
    loss = -dR * rho + dR.abs() / (2 * clip_range) * (rho - 1).square()
    return loss, rho


def own_direction(x: torch.Tensor, v_ref: torch.Tensor, sigma: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
    """Return the direction from the image that v_ref expects of a noised latent to the image itself, at size 1 (docs/method.md 4).

    x, v_ref, final [N, C, H, W]; sigma [N] -> [N, C, H, W] with mean square 1, in float32 or better; 0 where the two are equal.
    """
    dtype = torch.promote_types(final.dtype, torch.float32)
    expected = x.to(dtype) - sigma.to(dtype)[:, None, None, None] * v_ref.to(dtype)
    away = final.to(dtype) - expected  # [N, C, H, W]
    return away / away.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-6)


def choose_samples(draws: torch.Tensor, steps: int, both: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the (branch, step) samples of each pair to train on, with their weights (docs/method.md 4, subsets).

    draws [P, 2, K], uniform in [0, 1): for each of the K equal parts of the grid of `steps` steps, where in the part its one step
    lies, and which branch is taken unless both are. -> branch, step int64 and weight float64, [P, B, K] each, B = 2 for both.
    """
    P, _, K = draws.shape
    edges = torch.arange(K + 1) * steps // K  # first step of each part, then the end
    sizes = edges.diff()  # [K]
    step = edges[:-1] + (draws[:, 0] * sizes).long().clamp(max=sizes - 1)  # [P, K]
    branch = torch.arange(2)[:, None].expand(P, 2, K) if both else (draws[:, 1] >= 0.5).long()[:, None]  # [P, B, K]
    step, weight = (values[:, None].expand(branch.shape) for values in (step, (sizes.double() * K / steps).expand(P, K)))
    return branch, step, weight
