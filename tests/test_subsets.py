"""Training on a subset of an epoch's samples (docs/method.md 4): unbiased, drawn from positions, dealt evenly, the same after a resume."""

import dataclasses
import itertools
import math
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from ranks import run_ranks
from test_stopping import final_state, same, stopped
from test_training import comparable, first_rollout, log_of, small

from fdfo.config.command_line import parse_train_config
from fdfo.config.errors import UserError
from fdfo.config.options import flat, to_dict
from fdfo.config.plan import plan_batches
from fdfo.config.presets import PRESETS
from fdfo.config.train_options import OptimConfig, SampleConfig, TrainConfig
from fdfo.distributed.job import Job
from fdfo.method.estimator import choose_samples, surrogate_loss
from fdfo.method.rollout import pair_samples, score_share
from fdfo.method.trainer import train
from fdfo.method.update import accumulate_gradient, deal_samples, optimizer_step, step_samples
from fdfo.model.memory import trajectory_bytes
from fdfo.run_folder.start import find_auto_start, find_start

TINY = PRESETS["tiny-published"]


def subset(steps: int | None, branches: str, **changes) -> OptimConfig:
    return dataclasses.replace(TINY.train, steps_per_trajectory=steps, branches=branches, **changes)


def few(folder: Path, steps: int | None = 3, branches: str = "one", solver_steps: int = 4, **changes) -> TrainConfig:
    """A tiny run on a subset; 3 parts of 4 steps are unequal."""
    sample = SampleConfig(num_solver_steps=solver_steps, resolution=64)
    return small(folder, sample=sample, train=subset(steps, branches), **changes)


# -- the estimator


def every_draw(steps: int, parts: int, both: bool) -> list[torch.Tensor]:
    """All that can be drawn for one pair, each as likely as the others within its part: [1, 2, K]."""
    sizes = [(k + 1) * steps // parts - k * steps // parts for k in range(parts)]
    places = itertools.product(*[[(i + 0.5) / size for i in range(size)] for size in sizes])
    sides = [(0.25,) * parts] if both else list(itertools.product((0.25, 0.75), repeat=parts))
    return [torch.tensor([place, side], dtype=torch.float64)[None] for place in places for side in sides]


@pytest.mark.parametrize("both", [True, False], ids=["both", "one"])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6])
def test_the_mean_over_all_draws_is_the_gradient_of_all_samples(parts: int, both: bool):
    """In float64, of the loss itself for a linear network, away from the weights that sampled; 3 and 4 do not divide 6."""
    T, generator = 6, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, v_ref = normal(2, T, 2, 3, 3), normal(2, T, 2, 3, 3)  # [2, T, C, H, W]
    dx, dR = normal(1, 2, 3, 3) * torch.tensor([1.0, -1.0])[:, None, None, None], torch.tensor([0.7, -0.7]).double()

    def gradient(branch: torch.Tensor, step: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        matrix = (0.1 * torch.eye(2, dtype=torch.float64)).requires_grad_()
        v = torch.einsum("dc,nchw->ndhw", matrix, x[branch, step])
        loss, _ = surrogate_loss(v, v_ref[branch, step], dx[branch], dR[branch], 0.03)
        return torch.autograd.grad((weight * loss).mean(), matrix)[0]

    whole = torch.cartesian_prod(torch.arange(2), torch.arange(T)).T
    expected = gradient(whole[0], whole[1], torch.ones(2 * T, dtype=torch.float64))
    draws = every_draw(T, parts, both)
    found = [gradient(*(values.flatten() for values in choose_samples(draw, T, both))) for draw in draws]
    torch.testing.assert_close(torch.stack(found).mean(0), expected, rtol=1e-12, atol=1e-14)
    assert len(draws) == 1 or max((one - expected).norm() for one in found) > 0.01 * expected.norm()


def test_one_step_of_each_part_with_its_weight():
    draws = torch.rand(1000, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws[0], draws[1] = 0, 1 - 2**-53  # the ends of what can be drawn
    branch, step, weight = choose_samples(draws, 8, both=True)
    assert branch.shape == step.shape == weight.shape == (1000, 2, 3)
    assert (branch == torch.tensor([0, 1])[:, None]).all() and torch.equal(step[:, 0], step[:, 1])
    for part, steps in enumerate(([0, 1], [2, 3, 4], [5, 6, 7])):
        assert step[:, 0, part].unique().tolist() == steps
        assert (weight[:, :, part] == len(steps) * 3 / 8).all()
    branch, _, weight = choose_samples(draws, 8, both=False)
    assert branch.shape == (1000, 1, 3) and abs(branch.double().mean() - 0.5) < 0.05
    torch.testing.assert_close(weight.sum(-1), torch.full((1000, 1), 3.0, dtype=torch.float64))


def test_every_pair_draws_for_itself_and_every_epoch_anew():
    config = few(Path(), steps=4, solver_steps=40)
    whole, part = pair_samples(config, 2, range(10)), pair_samples(config, 2, range(3, 7))
    assert torch.equal(whole.step[12:28], part.step) and torch.equal(whole.trajectory[12:28] - 6, part.trajectory)
    assert len({tuple(row) for row in whole.step.view(10, 4).tolist()}) > 5
    assert not torch.equal(pair_samples(config, 3, range(10)).step, whole.step)
    everything = pair_samples(small(Path()), 0, range(3))
    assert everything.trajectory.tolist() == [i // 4 for i in range(24)] and everything.step.tolist() == [0, 1, 2, 3] * 6
    assert (everything.weight == 1).all()


# -- dealing


@pytest.mark.parametrize("pairs,steps,branches,gradient_steps", [(432, 5, "one", 4), (54, 7, "both", 4), (11, 3, "one", 5)])
def test_every_optimizer_step_gets_its_share_of_every_noise_level(pairs: int, steps: int, branches: str, gradient_steps: int):
    config = TrainConfig(
        train=OptimConfig(steps_per_trajectory=steps, branches=branches), total_pairs_per_epoch=pairs,
        gradient_steps_per_epoch=gradient_steps,
    )  # fmt: skip
    plan, count = plan_batches(config, 1), 2 if branches == "both" else 1
    dealt = deal_samples(plan, config.seed, 0)
    assert sorted(number for part in dealt for number in part) == list(range(pairs * count * steps)) == list(range(plan.samples))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    for part in dealt:
        levels = torch.bincount(torch.from_numpy(part % steps), minlength=steps)  # samples lie by pair, branch, part of the grid
        assert (levels - pairs * count / gradient_steps).abs().max() < 2
        if pairs == 432:
            assert (levels == 108).all()
            for rank in range(8):  # and a process has its share of the step, up to a sample for each part of the grid
                own = step_samples(plan, config, 0, range(54 * rank, 54 * rank + 54))[0].own
                assert abs(len(own) - 67.5) <= steps
    assert not torch.equal(torch.from_numpy(dealt[0]), torch.from_numpy(deal_samples(plan, config.seed, 1)[0]))


def test_the_plan_counts_what_is_trained():
    config = TrainConfig(train=OptimConfig(steps_per_trajectory=5, branches="one"))
    plan = plan_batches(config, 8)
    assert (
        plan.samples == 2160 and "2160 samples (5 steps of 1 branch(es) of each pair) in 4 optimizer step(s)" in plan.describe()
    )
    assert "34560 samples in 4" in plan_batches(TrainConfig(), 8).describe()
    with pytest.raises(UserError, match="more than its 2 samples"):
        plan_batches(dataclasses.replace(config, train=OptimConfig(steps_per_trajectory=1), total_pairs_per_epoch=1), 1)


def test_the_fast_preset_is_the_default_on_a_subset():
    config = parse_train_config(["--preset", "sd35-medium-fast"])
    default, found = flat(to_dict(TrainConfig())), flat(to_dict(config))
    different = {name for name in found if found[name] != default[name]}
    assert different == {"preset", "train.steps_per_trajectory", "train.branches"}
    plan = plan_batches(config, 8)
    assert 8 * plan.samples <= plan_batches(TrainConfig(), 8).samples and plan.pairs == (54,) * 8


# -- rollout and update


@pytest.mark.parametrize("steps,branches", [(3, "one"), (2, "both"), (None, "one"), (4, "both")])
def test_the_kept_samples_are_those_of_the_whole_trajectories(job: Job, tmp_path: Path, steps: int | None, branches: str):
    """And at unchanged weights their ratio is 1; the memory that is told is what they take."""
    everything = first_rollout(job, small(tmp_path / "all"))[1].rollout
    config = few(tmp_path / "few", steps, branches, max_batch_size=5)
    run, data = first_rollout(job, config)
    rollout, samples = data.rollout, data.rollout.samples
    assert len(rollout.xs) == len(samples.step) == 6 * (steps or 4) * (2 if branches == "both" else 1)
    place = samples.trajectory * 4 + samples.step
    torch.testing.assert_close(rollout.xs, everything.xs[place], rtol=0, atol=1e-4)
    torch.testing.assert_close(rollout.velocities, everything.velocities[place], rtol=0, atol=1e-3)
    assert trajectory_bytes(config, run.model, run.plan) == rollout.xs.nbytes + rollout.velocities.nbytes
    stats = optimizer_step(job, run.learner, data, step_samples(run.plan, config, 0, range(6))[0])
    assert stats.applied and stats.ratio_first == pytest.approx(1, abs=1e-4) and stats.ratio_mean == pytest.approx(1, abs=1e-4)


def test_the_mean_gradient_of_real_draws_nears_that_of_all_samples(job: Job, tmp_path: Path):
    """With unequal parts and one branch, on the tiny model: 30 draws of the samples of one rollout."""
    run, data = first_rollout(job, small(tmp_path, total_pairs_per_epoch=4))

    def gradient(config: TrainConfig, epoch: int) -> torch.Tensor:
        samples, plan = pair_samples(config, epoch, range(4)), plan_batches(config, 1)
        place = samples.trajectory * 4 + samples.step
        kept = data.rollout.xs[place], data.rollout.velocities[place]
        rollout = dataclasses.replace(data.rollout, samples=samples, xs=kept[0], velocities=kept[1])
        (all_of_it,) = step_samples(plan, config, epoch, range(4))
        run.learner.optimizer.zero_grad()
        accumulate_gradient(dataclasses.replace(data, rollout=rollout, plan=plan), all_of_it, 1.0, lambda done: False)
        return torch.cat([p.grad.flatten() for p in run.model.trainable()]).double()

    once = dict(total_pairs_per_epoch=4, gradient_steps_per_epoch=1)
    expected = gradient(small(tmp_path, **once), 0)
    found = torch.stack([gradient(few(tmp_path, **once), epoch) for epoch in range(30)])
    errors = (found - expected).norm(dim=1)
    assert (found.mean(0) - expected).norm() < 3 * errors.square().mean().sqrt() / 30**0.5
    assert errors.min() > 0


def test_a_broken_pair_is_dropped_with_all_its_samples(job: Job, tmp_path: Path):
    config = few(tmp_path)
    run, data = first_rollout(job, config)
    rollout = data.rollout
    rollout.final[3] = float("nan")
    rollout.velocities[rollout.samples.trajectory == 3] = float("nan")
    rollout.xs[rollout.samples.trajectory == 3] = float("nan")
    differences = score_share(rollout, torch.rand(12, 3, 64, 64), run.judges.reward)
    assert differences.dropped.tolist() == [False, False, True, True] + [False] * 8
    assert (rollout.xs[3:6] == 0).all() and (rollout.xs[:3] != 0).any() and (rollout.xs[6:] != 0).any()
    data = dataclasses.replace(data, differences=differences)
    for samples in step_samples(run.plan, config, 0, range(6)):
        assert optimizer_step(job, run.learner, data, samples).applied


def test_the_options_train_on_subsets(job: Job, tmp_path: Path):
    """With the KL term, guidance and trajectories in host memory, which changes no bit."""
    changes = dict(num_epochs=2, train=subset(3, "one", kl_weight=0.5))
    changes["sample"] = SampleConfig(num_solver_steps=4, resolution=64, guidance_scale=2.0)
    plain = train(job, small(tmp_path / "plain", **changes))
    host = train(job, small(tmp_path / "host", offload_trajectories=True, **changes))
    assert comparable(plain.folder) == comparable(host.folder)
    assert all(step["applied"] for step in log_of(plain.folder, "step"))


def test_cost_counts_what_is_trained(monkeypatch: pytest.MonkeyPatch):
    """benchmarks/learning_tables.py: forwards of sampling, and 2.2 for a sample of the update; scores lie on lines between evaluations."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from learning_tables import Cost, LearningRun, at_cost, cost_of

    log = [{"kind": "eval", "epoch": epoch, "scores": {"scene": [score]}} for epoch, score in ((0, 60.0), (10, 80.0), (20, 90.0))]
    runs = {name: LearningRun(name, 6, few(Path(), steps, branches), {}, log) for name, steps, branches in
            (("all", None, "both"), ("few", 2, "one"))}  # fmt: skip
    assert runs["all"].cost == Cost(12, 48, 48) and runs["few"].cost == Cost(12, 48, 12)
    assert runs["few"].cost.total == pytest.approx(48 + 2.2 * 12)
    assert cost_of(runs["few"], 85.0) == pytest.approx(15 * runs["few"].cost.total) and cost_of(runs["few"], 60.0) == 0
    assert at_cost(runs["all"], 5 * runs["all"].cost.total) == pytest.approx(70)
    assert math.isnan(cost_of(runs["all"], 95.0)) and math.isnan(at_cost(runs["all"], 21 * runs["all"].cost.total))


# -- processes, stops, resumes


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    folder, results = tmp_path_factory.mktemp("probes"), {}
    for processes in (1, 2, 3):
        out = folder / f"{processes}.pt"
        done = run_ranks(processes, "tests/distributed_probe.py", out, folder / f"runs{processes}", 20, 3, "one")
        assert done.returncode == 0, done.stderr[-3000:]
        results[processes] = torch.load(out, weights_only=True)
    return results


@pytest.mark.parametrize("processes", [2, 3])
def test_samples_and_adapter_are_the_same_for_any_number_of_processes(probes: dict, processes: int):
    one, many = probes[1], probes[processes]
    for name in ("drawn", "dealt"):
        assert sorted(row for part in one["parts"] for row in part[name]) == sorted(
            row for part in many["parts"] for row in part[name]
        )
    assert len(one["parts"][0]["drawn"]) == 20 * 3
    assert (one["gradient"] - many["gradient"]).norm() / one["gradient"].norm() < 1e-4
    change = (one["end"] - one["start"]).norm()
    difference = ((one["end"] - many["end"]).norm() / change).item()
    print(f"{processes} processes: change of the adapter differs by {difference:.2e}")
    assert change > 0 and difference < 0.02


def test_a_stop_inside_an_epoch_and_a_resume_change_no_bit(job: Job, tmp_path: Path):
    config = few(tmp_path / "straight", num_epochs=3, save_freq=1)
    straight = train(job, config).folder
    parts = dataclasses.replace(config, runs_dir=tmp_path / "parts")
    run = stopped(job, parts, "reduce_gradient", signal.SIGTERM)
    train(job, parts, find_start(str(run)))
    assert same(final_state(run, 3), final_state(straight, 3)) and comparable(run) == comparable(straight)


# -- wrong input


@pytest.mark.parametrize(
    "flags,says",
    [
        (["--train.steps-per-trajectory", "9"], "--train.steps-per-trajectory 9 is more than the 8 steps of a trajectory"),
        (["--train.steps-per-trajectory", "0"], "--train.steps-per-trajectory is 0: it should be greater than or equal to 1"),
        (["--train.branches", "one", "--churn.weight", "1e-20"], "--train.branches one needs branches that part"),
    ],
)
def test_wrong_subsets_end_with_one_sentence(run_cli, tmp_path: Path, flags: list[str], says: str):
    code, _, err = run_cli("train", "--preset", "tiny", "--runs-dir", tmp_path, *flags)
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("schedule", ["raw", "interval", "prior"])
def test_every_schedule_parts_the_branches(job: Job, tmp_path: Path, schedule: str):
    """So that none is refused beside one branch: even prior, which adds churn to the starting noise alone."""
    config = dataclasses.replace(few(tmp_path), churn=parse_train_config(["--churn.schedule", schedule]).churn)
    final = first_rollout(job, config)[1].rollout.final
    assert ((final[0::2] - final[1::2]).flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("changes,says", [((2, "one"), "steps-per-trajectory was 3"), ((3, "both"), "branches was one")])
def test_a_resume_with_another_subset_is_refused(job: Job, tmp_path: Path, changes: tuple[int, str], says: str):
    config = few(tmp_path)
    run = train(job, config).folder
    other = dataclasses.replace(config, num_epochs=2, train=subset(*changes))
    with pytest.raises(UserError, match=f"--train.{says} in the run to resume and is {changes[says.startswith('b')]} now"):
        train(job, other, find_start(str(run)))
    assert find_auto_start(other).checkpoint is None
    rate = dataclasses.replace(config, num_epochs=2, train=subset(3, "one", learning_rate=1e-4))
    assert train(job, rate, find_start(str(run))).progress.epochs == 2  # a number of --train may change on purpose
