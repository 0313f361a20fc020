"""benchmarks/rivals/: the equations of both rivals, and short runs on the harness of train.py."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, normals

from fdfo.config.command_line import parse
from fdfo.config.errors import UserError
from fdfo.config.presets import PRESETS
from fdfo.config.train_options import ChurnConfig
from fdfo.distributed.job import Job
from fdfo.method.estimator import pair_deviation
from fdfo.method.prepare import Run
from fdfo.method.trainer import train
from fdfo.run_folder.log import LOG, read_log

sys.path[:0] = [str(ROOT / "benchmarks" / "rivals"), str(ROOT / "benchmarks")]

from common import RivalOptions, move_average, tiny_config  # noqa: E402
from diffusion_nft import DiffusionNft, NftOptions, implicit_policies, nft_loss, optimality  # noqa: E402
from fdfo_variants import FdfoVariant, VariantOptions  # noqa: E402
from flow_grpo import (  # noqa: E402
    FlowGrpo,
    FlowGrpoOptions,
    clipped_loss,
    group_advantages,
    log_ratio,
    noise_levels,
    sde_step,
    velocity_weights,
)
from learning_tables import Cost, LearningRun, cost_of_epoch  # noqa: E402
from loop import learning_rate, train_rival  # noqa: E402
from settings import SETTINGS  # noqa: E402
from variant_math import best_and_worst, deviation, gain_probabilities, noise_weights  # noqa: E402

GRID = torch.tensor([1.0, 0.9, 0.6, 0.2, 0.0])
SMALL = {"num_epochs": 2, "images": 16, "eval_every": 1, "eval_prompts": 8}


# ---------------------------------------------------------------------------------------------------------------------
# Flow-GRPO


def test_the_ratio_is_that_of_the_densities_of_the_drawn_step():
    x, v, dv, noise = normals(4, 2, 3, 3, 3)
    levels = noise_levels(GRID, 0.7)
    weights = velocity_weights(GRID, levels)
    for i in range(4):
        t, t_next, level = GRID[i].item(), GRID[i + 1].item(), levels[i].item()
        (old, deviation), (new, _) = (sde_step(x, velocity, t, t_next, level) for velocity in (v, v + dv))
        drawn = old + deviation * noise
        wanted = torch.distributions.Normal(new, deviation).log_prob(drawn) - torch.distributions.Normal(old, deviation).log_prob(
            drawn
        )
        found = log_ratio(dv, noise, weights[i].expand(2).double(), "sum")
        torch.testing.assert_close(found, wanted.sum((1, 2, 3)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(log_ratio(dv, noise, weights[i].expand(2).double(), "mean"), found / 27)
    assert log_ratio(0 * dv, noise, weights[:2], "sum").tolist() == [0, 0]


def test_the_sde_keeps_the_marginals_of_the_flow():
    """For one data point x0 the exact v is (x - x0) / t; a small step from the marginal at t leads to that at t - dt."""
    x0, t, dt, a = 2.0, 0.5, 1e-3, 0.7
    x = (1 - t) * x0 + t * normals(400_000, 1, 1, 1)
    mean, deviation = sde_step(x, (x - x0) / t, t, t - dt, a * (t / (1 - t)) ** 0.5)
    assert float(mean.mean()) == pytest.approx((1 - t + dt) * x0, abs=3e-3)
    assert float((mean.var() + deviation**2) / x.var()) == pytest.approx(((t - dt) / t) ** 2, abs=3e-5)


def test_advantages_and_the_clipped_loss():
    assert group_advantages(torch.tensor([1.0, 3.0, 7.0, 7.0]), 2).tolist() == pytest.approx(
        [-(0.5**0.5), 0.5**0.5, 0, 0], abs=1e-5
    )
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5], requires_grad=True)
    loss = clipped_loss(ratio, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    assert loss.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8])
    loss.sum().backward()
    assert ratio.grad.tolist() == [0, 1, -1, 0]  # no gain beyond the clip range, but a way back


# ---------------------------------------------------------------------------------------------------------------------
# DiffusionNFT


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_gradient_at_the_old_policy_is_the_flow_matching_direction_times_2r_minus_1(beta: float):
    """d loss / d v = 2 beta [r (v+ - v_target) - (1 - r) (v- - v_target)]; at v = v_old both brackets are v_old - v_target."""
    v_old, target = normals(2, 3, 1, 2, 2)
    t, r = torch.tensor([0.9, 0.5, 0.2]).double(), torch.tensor([0.5, 1.0, 0.2]).double()
    v = v_old.clone().requires_grad_()
    nft_loss(implicit_policies(v, v_old, beta), target, t, r, "none").sum().backward()
    factor = (2 * beta * (2 * r - 1))[:, None, None, None] / 4  # the mean over 4 elements
    torch.testing.assert_close(v.grad, factor * (v_old - target))
    weighted = v_old.clone().requires_grad_()
    nft_loss(implicit_policies(weighted, v_old, beta), target, t, r, "self").sum().backward()
    assert not weighted.grad[0].any()  # r = 1/2: the target cancels, image for image, with either weighting
    for i in (1, 2):  # the self-normalised weighting changes lengths alone
        assert float(torch.cosine_similarity(weighted.grad[i].flatten(), v.grad[i].flatten(), dim=0)) == pytest.approx(1)


def test_at_r_one_half_the_gradient_pulls_to_the_old_policy():
    v_old, target, change = normals(3, 1, 1, 2, 2)
    v = (v_old + change).requires_grad_()
    nft_loss(implicit_policies(v, v_old, 0.3), target, torch.tensor([0.5]), torch.tensor([0.5]), "none").sum().backward()
    torch.testing.assert_close(v.grad, 2 * 0.3**2 * change / 4)


def test_the_optimum_is_the_old_policy_and_2_over_beta_times_the_improvement():
    """At one x_t with equally likely data points: Delta = share rewarded x (velocity of the rewarded part - v_old)."""
    target, beta = normals(6, 1, 1, 1), 0.5
    r = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0, 1.0]).double()
    v_old = target.mean()
    rewarded = (r * target.flatten()).sum() / r.sum()
    v = (v_old + 2 / beta * r.mean() * (rewarded - v_old)).clone().requires_grad_()
    policies = implicit_policies(v.expand_as(target), v_old.expand_as(target), beta)
    nft_loss(policies, target, torch.ones(6), r, "none").sum().backward()
    assert float(v.grad) == pytest.approx(0, abs=1e-12)


def test_rewards_become_probabilities():
    r = optimality(torch.tensor([1.0, 3.0, 7.0, 7.0]), 2, "all")
    spread = float(torch.tensor([1.0, 3.0, 7.0, 7.0]).std())
    assert r.tolist() == pytest.approx([0.5 - 0.5 / spread, 0.5 + 0.5 / spread, 0.5, 0.5])
    assert optimality(torch.tensor([0.0, 0.0, 0.0, 9.0]), 4, "group").tolist() == pytest.approx([0.25, 0.25, 0.25, 1])


# ---------------------------------------------------------------------------------------------------------------------
# FDFO's variants


def test_deviations_from_the_mean_of_a_group():
    values = normals(8, 2)
    torch.testing.assert_close(deviation(values, 2), pair_deviation(values), rtol=0, atol=0)
    of_four = deviation(values, 4)
    torch.testing.assert_close(of_four[:4] - of_four[0], values[:4] - values[0])
    torch.testing.assert_close(of_four.view(2, 4, 2).sum(1), torch.zeros(2, 2).double())


def test_the_best_and_the_worst_branch_are_kept_in_the_order_of_rows():
    rewards = torch.tensor([3.0, 9.0, 1.0, 4.0, 7.0, 5.0, 6.0, 2.0, 8.0, 8.0, 8.0, 8.0])
    assert best_and_worst(rewards, 4).tolist() == [1, 2, 4, 7, 8, 11]
    assert best_and_worst(rewards, 2).tolist() == list(range(12))


def test_weights_by_noise_level():
    assert noise_weights(GRID, 0).tolist() == [1, 1, 1, 1]
    assert noise_weights(GRID, 1).tolist() == pytest.approx([sigma / 0.675 for sigma in (1, 0.9, 0.6, 0.2)])
    assert noise_weights(GRID, -2).tolist() == pytest.approx([part**2 / 0.2025 for part in (0, 0.1, 0.4, 0.8)])


def test_prompts_are_drawn_by_what_they_have_to_gain():
    assert gain_probabilities(np.full(4, np.nan), 2).tolist() == [0.25] * 4
    means = np.array([100, 98, np.nan])  # the last counts as 99
    assert gain_probabilities(means, 1).tolist() == pytest.approx([1 / 6, 3 / 6, 2 / 6])
    assert gain_probabilities(means, 2).tolist() == pytest.approx([1 / 14, 9 / 14, 4 / 14])


def test_the_learning_rate_falls_and_the_average_follows():
    falls = VariantOptions(num_epochs=5, learning_rate=1e-3, fall_to=0.2)
    assert [learning_rate(falls, epoch) for epoch in range(5)] == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])
    assert learning_rate(dataclasses.replace(falls, fall_to=1.0), 3) == 1e-3
    average = [torch.tensor([0.0, 4.0])]
    move_average(average, [torch.nn.Parameter(torch.tensor([8.0, 4.0]))], 0.75)
    assert average[0].tolist() == [2, 4]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--baseline best-worst", "--baseline best-worst has no effect"),
        ("--baseline prompt", "--baseline prompt has no effect"),
        ("--ema-eval", "--ema-eval has no effect"),
        ("--group 3", "--group is 3: it should be a multiple of 2"),
        ("--group 12", "should be even and a multiple of the 12 images of a prompt"),
    ],
)
def test_flags_of_variants_that_do_not_fit(flags: str, message: str):
    with pytest.raises(UserError, match=message):
        tiny_config(parse(VariantOptions, flags.split()), "variant")


# ---------------------------------------------------------------------------------------------------------------------
# runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of train.py."""
    small = {"num_epochs": 2, "total_pairs_per_epoch": 8, "eval_every": 1, "eval_prompts": 8}
    return train(
        Job(0, 1, CPU), dataclasses.replace(PRESETS["tiny-published"], **small, runs_dir=tmp_path_factory.mktemp("base"))
    )


@pytest.fixture
def base(trained: Run) -> dict:
    """The line of the evaluation before training, of train.py."""
    return trained.log.evaluations[0]


RIVALS = [(FlowGrpo, FlowGrpoOptions(**SMALL, kl_weight=0.01)), (DiffusionNft, NftOptions(**SMALL, noise_levels=4))]


@pytest.mark.parametrize("rival, options", RIVALS)
def test_a_rival_starts_as_train_py_and_logs_as_it_does(rival: type, options: RivalOptions, base: dict, job: Job, tmp_path: Path):
    run = train_rival(job, dataclasses.replace(options, out=tmp_path), rival)
    first = run.log.evaluations[0]
    assert first["means"] == base["means"] and first["scores"] == base["scores"]
    assert [line["epoch"] for line in run.log.evaluations] == [0, 1, 2] and run.log.evaluations[2]["means"] != base["means"]
    read = LearningRun(rival.name, 6, run.config, {"wall": 1.0}, read_log(run.folder / LOG)[0])
    assert len(read.of("step")) == 8 and all(step["applied"] and step["grad_norm"] > 0 for step in read.of("step"))
    assert read.cost == (Cost(16, 2 * 16 * 8, 16 * 8) if rival is FlowGrpo else Cost(16, 16 * (8 + 4), 16 * 4))
    assert read.seconds()[0] > 0 and len(read.curve()) == 3
    if rival is FlowGrpo:
        assert read.of("step")[0]["ratio_mean"] == pytest.approx(1, abs=1e-3) and read.of("step")[0]["clipfrac"] == 0
    else:
        assert read.of("step")[0]["distance_to_old"] == pytest.approx(0, abs=1e-8)


FORWARD, FORWARD_FLAGS = PRESETS["tiny"].train, SETTINGS["fdfo_variants"]["fresh-residual-twins-relative-5-rate-1e-3"]


@pytest.mark.parametrize(
    "changes, flags",
    [
        ({}, ""),
        (
            dict(train=FORWARD, churn=ChurnConfig("prior", weight=8, weight_sd=0)),
            FORWARD_FLAGS + " --schedule prior --churn 8",
        ),
        (dict(train=FORWARD), FORWARD_FLAGS),
    ],
    ids=["FDFO", "independent images", "the tiny preset"],
)
def test_a_variant_is_train_py(trained: Run, job: Job, tmp_path: Path, changes: dict, flags: str):
    if changes:
        trained = train(job, dataclasses.replace(trained.config, **changes, runs_dir=tmp_path / "train"))
    options = dataclasses.replace(parse(VariantOptions, flags.split()), **SMALL, out=tmp_path)
    run = train_rival(job, options, FdfoVariant)
    lines, wanted = ([line for line in read_log(one.folder / LOG)[0] if line["kind"] != "start"] for one in (run, trained))
    assert [(line["kind"], line["epoch"]) for line in lines] == [(line["kind"], line["epoch"]) for line in wanted]
    assert all(Cost(**line["cost"]) == cost_of_epoch(trained.config) for line in lines if line["kind"] == "epoch")
    for line, other in zip(lines, wanted, strict=True):
        for name in {"reward_mean", "reward_std", "loss", "clipfrac", "ratio_mean", "grad_norm", "means"} & set(other):
            if name in line:
                assert line[name] == pytest.approx(other[name], rel=1e-4), (line["kind"], line["epoch"], name)


def test_a_variant_with_all_flags_learns_from_what_it_keeps(job: Job, tmp_path: Path):
    flags = "--group 4 --baseline best-worst --starts-per-prompt 2 --ema 0.5 --ema-eval --fall-to 0.1 --optimizer-steps 3"
    flags += " --adam-beta2 0.9 --max-grad-norm 9 --noise-weight -1 --gain-power 1 --proximal 9 --relative-proximal 2 --churn 0.05 --clip-range 0.5"
    options = dataclasses.replace(parse(VariantOptions, flags.split()), **SMALL, out=tmp_path)
    run = train_rival(job, options, FdfoVariant)
    group = run.learner.optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(2e-5) and group["betas"] == (0.9, 0.9) and run.config.train.max_grad_norm == 9
    read = LearningRun("all", 6, run.config, {"wall": 1.0}, read_log(run.folder / LOG)[0])
    assert read.cost == Cost(16, 16 * 8, 8 * 8) and len(read.of("step")) == 2 * 3
    first = read.of("step")[0], read.of("step")[3]
    assert first[0]["ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert abs(first[1]["ratio_mean"] - 1) > 1e-5  # the network is ahead of the average that drew


def test_a_variant_trains_at_images_noised_anew(job: Job, tmp_path: Path):
    flags = "--twin 0 --residual 1 --states fresh --starts-per-prompt 4"
    options = dataclasses.replace(parse(VariantOptions, flags.split()), **SMALL, out=tmp_path)
    run = train_rival(job, options, FdfoVariant)
    read = LearningRun("fresh", 6, run.config, {"wall": 1.0}, read_log(run.folder / LOG)[0])
    assert read.cost == Cost(16, 2 * 16 * 8, 16 * 8)
    assert read.of("step")[0]["ratio_mean"] == pytest.approx(1, abs=1e-6) and read.of("step")[0]["grad_norm"] > 0
