"""Training on final latents noised anew (docs/method.md 4)."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import normals
from test_training import comparable, first_rollout, log_of, small

from fdfo.config.presets import PRESETS
from fdfo.config.train_options import ChurnConfig, SampleConfig, TrainConfig
from fdfo.distributed.job import Job
from fdfo.method.estimator import own_direction
from fdfo.method.rollout import PairShare, sample_share
from fdfo.method.sampling import noised
from fdfo.method.trainer import train
from fdfo.method.update import optimizer_step, step_samples
from fdfo.model.flow_model import FlowModel

INDEPENDENT = ChurnConfig("prior", weight=8, weight_sd=0)
SAMPLE = SampleConfig(num_solver_steps=4, resolution=64, guidance_scale=2.0)


def forward(folder: Path, *, changes: dict, **others) -> TrainConfig:
    optim = dataclasses.replace(PRESETS["tiny-published"].train, forward_process=True, **changes)
    return small(folder, **({"sample": SAMPLE} | others), churn=INDEPENDENT, train=optim)


def test_the_direction_points_to_the_image_that_came():
    final, noise, v_ref = normals(3, 3, 2, 2, 2)
    sigma = torch.tensor([0.9, 0.6, 0.2]).double()
    d = own_direction(noised(final, sigma, noise), v_ref, sigma, final)
    torch.testing.assert_close(d.square().mean((1, 2, 3)), torch.ones(3).double())
    error = v_ref - (noise - final)  # so a velocity moved against d comes closer to the one that leads to the image
    torch.testing.assert_close(d, error / error.square().mean((1, 2, 3), keepdim=True).sqrt())
    halves = own_direction(*(tensor.half() for tensor in (noised(final, sigma, noise), v_ref, sigma)), final.float())
    assert halves.dtype == torch.float32


def test_samples_are_noised_final_latents_whatever_the_share_and_the_batch(job: Job, tmp_path: Path):
    config = forward(tmp_path, changes=dict(steps_per_trajectory=3, branches="one"))
    run, data = first_rollout(job, config)
    rollout, sigmas = data.rollout, run.model.sigmas(4, 64)
    row, step = rollout.samples.trajectory, rollout.samples.step
    sigma = sigmas[step][:, None, None, None]
    noise = (rollout.xs - (1 - sigma) * rollout.final[row]) / sigma
    assert noise.flatten(1).std(1) == pytest.approx(torch.ones(len(row)), abs=0.15)
    assert len(noise[:, 0, 0, 0].round(decimals=3).unique()) == len(row)  # another noise for every sample
    correlation = torch.corrcoef(torch.stack([noise.flatten(), rollout.final[row].flatten()]))[0, 1]
    assert abs(correlation) < 0.05
    twins = torch.corrcoef(torch.stack([rollout.final[0::2].flatten(), rollout.final[1::2].flatten()]))[0, 1]
    assert twins < 0.9  # images of a prompt, but of independent starts
    prompts = run.prompts[2:6]
    part = PairShare(0, range(2, 6), prompts, *run.model.encode_prompts(prompts, 2.0))
    alone = sample_share(run.model, config, dataclasses.replace(run.plan, sample_batch=3), part)
    torch.testing.assert_close(alone.xs, rollout.xs[2 * 3 :], rtol=0, atol=1e-4)
    torch.testing.assert_close(alone.velocities, rollout.velocities[2 * 3 :], rtol=0, atol=1e-3)


def test_it_trains_with_other_options_and_in_host_memory(job: Job, tmp_path: Path):
    changes = dict(steps_per_trajectory=3, branches="one", kl_weight=0.5, proximal_weight=5.0)
    plain = train(job, forward(tmp_path / "plain", changes=changes, num_epochs=2))
    host = train(job, forward(tmp_path / "host", changes=changes, num_epochs=2, offload_trajectories=True))
    assert comparable(plain.folder) == comparable(host.folder)
    steps = log_of(plain.folder, "step")
    assert all(step["applied"] and step["grad_norm"] > 0 for step in steps) and steps[0]["ratio_first"] == 1.0


def test_an_overflow_at_a_noised_latent_drops_the_pair_alone(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = forward(tmp_path, changes={}, sample=SampleConfig(num_solver_steps=4, resolution=64))
    velocity, calls = FlowModel.velocity, []

    def overflowing(model: FlowModel, *given) -> torch.Tensor:
        v = velocity(model, *given)
        calls.append(len(v))
        if len(calls) == 5:  # the first after the four steps of all images: the trained samples of the first three
            v[4] = torch.inf
        return v

    monkeypatch.setattr(FlowModel, "velocity", overflowing)
    run, data = first_rollout(job, config)
    assert calls == [12] * 8 and data.differences.dropped.tolist() == [True, True] + [False] * 10
    assert optimizer_step(job, run.learner, data, step_samples(run.plan, config, 0, range(6))[0]).applied
