"""docs/method.md 3 and 4: finite differences and the surrogate loss."""

import torch

from fdfo.method.estimator import pair_deviation, surrogate_loss


def tensors(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    v, v_ref, dx = (torch.randn(6, 2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    return [v.to(dtype), v_ref.to(dtype), (0.3 * dx).to(dtype), torch.linspace(-1, 1, 6, dtype=torch.float64).to(dtype)]


def test_pair_deviation_keeps_half_the_difference():
    values = torch.tensor([3.0, 1.0, -2.0, 2.0])
    assert pair_deviation(values).tolist() == [1.0, -1.0, -2.0, 2.0]
    images = torch.randn(6, 2, 3, 4)
    deviation = pair_deviation(images)
    assert torch.equal(deviation[0::2], -deviation[1::2])
    torch.testing.assert_close(deviation[0], (images[0] - images[1]) / 2)


def test_loss_is_the_formula_of_the_method():
    v, v_ref, dx, dR = tensors()
    v = v_ref + 0.01 * v
    loss, ratio = surrogate_loss(v, v_ref, dx, dR, 0.03)
    d = dx / (dx.square().mean((1, 2, 3), keepdim=True) + 1e-6)
    target = v_ref - d
    rho = torch.exp(-(v - target).square().mean((1, 2, 3)) + d.square().mean((1, 2, 3)))
    torch.testing.assert_close(ratio, rho)
    torch.testing.assert_close(loss, -dR * rho + dR.abs() / 0.06 * (rho - 1).square())
    assert loss.shape == ratio.shape == (6,)


def test_gradient_at_unchanged_weights_is_the_closed_form():
    _, v_ref, dx, dR = tensors()
    v = v_ref.clone().requires_grad_()
    loss, ratio = surrogate_loss(v, v_ref, dx, dR, 0.03)
    loss.sum().backward()
    d = dx / (dx.square().mean((1, 2, 3), keepdim=True) + 1e-6)
    closed = dR[:, None, None, None] * 2 * d / dx[0].numel()  # -dR d rho / dv with rho = 1, d rho / dv = -2 d / CHW
    torch.testing.assert_close(v.grad, closed, rtol=1e-12, atol=1e-15)
    assert torch.equal(ratio, torch.ones_like(ratio))


def test_half_precision_inputs_are_computed_in_float32():
    v, v_ref, dx, dR = tensors(torch.float16)
    loss, ratio = surrogate_loss(v_ref, v_ref, dx, dR, 0.03)
    assert loss.dtype == ratio.dtype == torch.float32
    assert tensors()[0].dtype == surrogate_loss(*tensors(), 0.03)[0].dtype == torch.float64


def test_nearly_equal_branches_do_not_lose_the_ratio():
    """d is large where dx is small; the difference of two large means would swallow the ratio in float32."""
    v_ref, dx = torch.randn(1, 2, 3, 4), 1e-4 * torch.randn(1, 2, 3, 4)
    v = v_ref + 1e-4 * torch.randn(1, 2, 3, 4)
    _, single = surrogate_loss(v, v_ref, dx, torch.ones(1), 0.03)
    _, double = surrogate_loss(v.double(), v_ref.double(), dx.double(), torch.ones(1).double(), 0.03)
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=0)
