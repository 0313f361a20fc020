"""docs/method.md 1 and 2: the churned step, the schedules, and paired sampling against diffusers' own pipeline."""

import math

import pytest
import torch

from fdfo.method.rollout import standard_normal
from fdfo.method.sampling import churn_step, churn_weights, interval_gammas, prior_gammas, raw_gammas, sample_pairs

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.1, 0.0])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_without_churn_the_step_is_euler_to_the_bit():
    x, v, noise = (normal(5, 3, 4, 4, seed=seed) for seed in range(3))
    for sigma, following in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
        stepped = churn_step(x, v, sigma.item(), following.item(), torch.zeros(5), noise)
        assert torch.equal(stepped, x + (following - sigma) * v)


@pytest.mark.parametrize("sigma,following", [(1.0, 0.9), (0.8, 0.5), (0.5, 0.05), (0.3, 0.3)])
@pytest.mark.parametrize("gamma", [0.0025, 0.1, 1.5])
def test_churn_keeps_the_marginal(sigma: float, following: float, gamma: float):
    n, x0 = 1_000_000, 1.7
    noise, churn = normal(n, 1, 1, 1).double(), normal(n, 1, 1, 1, seed=1).double()
    x = (1 - sigma) * x0 + sigma * noise
    v = (x - x0) / sigma  # the exact velocity of a single data point
    stepped = churn_step(x, v, sigma, following, torch.full((n,), gamma, dtype=torch.float64), churn)
    assert abs(stepped.mean().item() - (1 - following) * x0) < 0.01
    assert abs(stepped.var().item() / following**2 - 1) < 0.01


def test_landing_on_data_adds_nothing():
    x, v, noise = (normal(2, 1, 2, 2, seed=seed) for seed in range(3))
    assert torch.equal(churn_step(x, v, 0.1, 0.0, torch.tensor([0.5, 2.0]), noise), x - 0.1 * v)


def test_start_churn_keeps_unit_variance():
    x, noise, gamma = normal(200_000, 1, 1, 1), normal(200_000, 1, 1, 1, seed=1), 0.3
    churned = churn_step(x, torch.zeros_like(x), 1.0, 1.0, torch.full((len(x),), gamma), noise)
    expected = (x + math.sqrt((1 + gamma) ** 2 - 1) * noise) / (1 + gamma)
    torch.testing.assert_close(churned, expected)
    assert abs(churned.var().item() - 1) < 0.01


def test_raw_schedule():
    gammas = raw_gammas(SIGMAS, 3, 0.0025)
    assert gammas.shape == (3, 6) and gammas.dtype == torch.float32
    assert (gammas[:, :-1] == 0.0025).all() and (gammas[:, -1] == 0).all()


def test_interval_schedule_by_hand():
    m, w = 1.0 + 1.5 * 0.5, 0.7 * math.exp(0.3 * 2.0)
    gammas = interval_gammas(SIGMAS, torch.tensor([m]).double(), churn_weights(torch.tensor([2.0]), 0.7, 0.3), 0.25)
    density = [0.0]
    for sigma in (0.9, 0.7, 0.4, 0.1):
        z = (math.log(sigma / (1 - sigma)) - m) / 0.25
        density.append(math.exp(-z * z / 2) / (0.25 * math.sqrt(2 * math.pi) * sigma * (1 - sigma)))
    expected = [math.exp(w * p / sum(density)) - 1 for p in density]
    torch.testing.assert_close(gammas[0, :-1], torch.tensor(expected), rtol=1e-5, atol=1e-7)
    assert gammas.shape == (1, 6) and gammas[0, -1] == 0


def test_interval_beyond_the_grid_spreads_evenly():
    gammas = interval_gammas(SIGMAS, torch.tensor([61.0]).double(), torch.ones(1).double(), 0.25)
    torch.testing.assert_close(gammas[0, :-1], torch.full((5,), math.exp(1 / 5) - 1))


def test_prior_schedule():
    gammas = prior_gammas(SIGMAS, churn_weights(torch.tensor([0.0, 1.0]), 0.1, 1.0))
    torch.testing.assert_close(gammas[:, 0], torch.tensor([math.exp(0.1) - 1, math.exp(0.1 * math.e) - 1]))
    assert gammas.shape == (2, 6) and (gammas[:, 1:] == 0).all()


def test_much_churn_leaves_the_new_noise():
    x, noise = normal(2, 4, 8, 8, seed=1).float(), normal(2, 4, 8, 8, seed=2).float()
    weights = torch.tensor([100.0, 1e6]).double()
    start = churn_step(x, torch.zeros_like(x), 1.0, 1.0, prior_gammas(SIGMAS, weights)[:, 0], noise)
    torch.testing.assert_close(start, noise, rtol=0, atol=1e-5)
    gammas = interval_gammas(SIGMAS, torch.zeros(2).double(), weights, 0.25)
    assert churn_step(x, x, 0.7, 0.4, gammas[:, 3], noise).isfinite().all()


def test_branches_part_through_churn_alone():
    calls, xs, velocities = [], [], []

    def keep(step: int, x: torch.Tensor, v: torch.Tensor) -> None:
        assert step == len(xs)
        xs.append(x)
        velocities.append(v)

    def noise(step: int) -> torch.Tensor:
        calls.append(step)
        return normal(4, 1, 2, 2, seed=step)

    x_init, gammas = normal(2, 1, 2, 2, seed=9), raw_gammas(SIGMAS, 2, 0.0)
    gammas[1, 2] = 0.5  # pair 1 alone is churned, where step 1 lands
    final = sample_pairs(lambda x, sigma: x * sigma, x_init, SIGMAS, gammas, noise, keep)
    assert len(xs) == len(velocities) == 5 and final.shape == xs[0].shape == (4, 1, 2, 2)
    assert calls == [0, 1, 2, 3, 4, 5]
    assert torch.equal(final[0], final[1])
    assert torch.equal(xs[1][2], xs[1][3]) and not torch.equal(xs[2][2], xs[2][3])
    assert torch.equal(velocities[3], xs[3] * SIGMAS[3])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_without_churn_it_is_diffusers_pipeline(tiny, guidance: float):
    prompts = ["a red circle on a white background", "a blue ring above a green cross on a black background"]
    shape = tiny.latent_shape(64)
    x_init = torch.stack([standard_normal(shape, 0, 0, pair, 0) for pair in range(2)])
    expected = tiny.pipe(
        prompts,
        latents=x_init,
        guidance_scale=guidance,
        num_inference_steps=6,
        height=64,
        width=64,
        max_sequence_length=tiny.family.text_length(128),
        output_type="latent",
    ).images
    text, empty = tiny.encode(prompts), tiny.encode([""])
    text = text.rows(torch.tensor([0, 0, 1, 1]))
    with torch.no_grad():
        final = sample_pairs(
            lambda x, sigma: tiny.velocity(x, torch.full((4,), sigma), text, empty, guidance),
            x_init,
            tiny.sigmas(6, 64),
            torch.zeros(2, 7),
            lambda step: torch.zeros(4, *shape),
            lambda step, x, v: None,
        )
    torch.testing.assert_close(final[0::2], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final[0::2], final[1::2], rtol=0, atol=1e-5)
