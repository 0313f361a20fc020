"""The training loop on the tiny model: exact resume, checks of the first minute, values that are not finite, options."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fdfo.config.errors import UserError
from fdfo.config.presets import PRESETS
from fdfo.config.train_options import ChurnConfig, OptimConfig, SampleConfig, TrainConfig
from fdfo.distributed.job import Job
from fdfo.evaluation.health import check_ratio
from fdfo.method.learner import LossScale
from fdfo.method.prepare import Run, prepare
from fdfo.method.rollout import PairShare, sample_share, score_share
from fdfo.method.trainer import train
from fdfo.method.update import EpochData, StepSamples, farthest_ratio, micro_batch_loss, optimizer_step, step_samples
from fdfo.run_folder.find_checkpoint import find_checkpoint, read_config
from fdfo.run_folder.log import RunLog
from fdfo.run_folder.start import FRESH, find_start
from fdfo.storage.prompts import load_prompts

TINY = PRESETS["tiny-published"]


def small(folder: Path, **changes) -> TrainConfig:
    """A tiny run of seconds."""
    quick = dict(
        sample=SampleConfig(num_solver_steps=4, resolution=64),
        total_pairs_per_epoch=6,
        num_epochs=1,
        eval_prompts=0,
        runs_dir=folder,
    )
    return dataclasses.replace(TINY, **(quick | changes))


def log_of(run: Path, kind: str | None = None) -> list[dict]:
    lines = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def comparable(run: Path) -> list[dict]:
    """The log without what no two runs share: clock, memory, and the lines of a start."""
    return [
        {name: value for name, value in line.items() if name not in ("seconds", "memory_gib", "peak_memory_gib")}
        for line in log_of(run)
        if line["kind"] != "start"
    ]


def test_run_folder_holds_what_it_should(job: Job, tmp_path: Path):
    config = small(tmp_path, num_epochs=2, save_freq=1)
    run = train(job, config)
    assert run.folder == tmp_path / "00000-scene-cfg_1p0"
    assert read_config(run.folder) == config
    epochs, steps = log_of(run.folder, "epoch"), log_of(run.folder, "step")
    assert len(epochs) == 2 and len(steps) == 8
    assert set(epochs[1]["seconds"]) == {"encode", "sample", "decode", "reward", "update", "checkpoint"}
    assert epochs[0]["ratio_first"] == pytest.approx(1, abs=1e-3) and epochs[0]["grad_norm"] > 0
    assert epochs[0]["scores"].keys() == {"scene"} and epochs[0]["peak_memory_gib"] > 0
    for epoch in (1, 2):
        folder = run.folder / "checkpoints" / f"epoch-000000{epoch}"
        assert {p.name for p in folder.iterdir()} == {
            "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors", "README.md",
            "training_state.json", "training_state.safetensors",
        }  # fmt: skip


def test_resume_is_exact_to_the_bit(job: Job, tmp_path: Path):
    config = small(tmp_path / "straight", num_epochs=4, save_freq=2)
    straight = train(job, config).folder
    first = train(job, dataclasses.replace(config, runs_dir=tmp_path / "parts", num_epochs=2)).folder
    with (first / "training_log.jsonl").open("a") as file:  # what a run killed in epoch 3 leaves behind
        file.write(json.dumps({"kind": "step", "epoch": 3, "step": 1, "loss": 0.0}) + "\n" + '{"kind": "st')
    second = train(job, dataclasses.replace(config, runs_dir=tmp_path / "parts"), find_start(str(first))).folder
    assert second.resolve() == first.resolve()
    for name in ("adapter_model.safetensors", "training_state.safetensors"):
        one, two = (load_file(run / "checkpoints" / "epoch-0000004" / name) for run in (straight, first))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    for name in ("pytorch_lora_weights.safetensors", "README.md"):
        one, two = ((run / "checkpoints" / "epoch-0000004" / name).read_bytes() for run in (straight, first))
        assert one == two
    assert comparable(straight) == comparable(first)


def test_resume_from_a_run_needs_no_other_flag(run_cli, tmp_path: Path, job: Job):
    run = train(job, small(tmp_path, lora_rank=8, lora_alpha=16)).folder
    code, out, _ = run_cli("train", "--resume-from", run, "--num-epochs", 2)
    assert code == 0 and f"resuming {run.resolve()} after epoch 1" in out
    assert len(list(tmp_path.iterdir())) == 1 and len(log_of(run, "epoch")) == 2


def test_adapter_without_state_starts_a_new_run(tmp_path: Path, job: Job, capsys):
    config = small(tmp_path / "first")
    checkpoint = train(job, config).folder / "checkpoints" / "epoch-0000001"
    published = tmp_path / "published"
    published.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(checkpoint / name, published)
    run = train(job, dataclasses.replace(config, runs_dir=tmp_path / "second"), find_start(str(published)))
    assert run.folder.name.startswith("00000-") and log_of(run.folder, "epoch")[0]["epoch"] == 1
    published = published.rename(tmp_path / "fdfo-cfg-4.5")
    train(job, dataclasses.replace(config, runs_dir=tmp_path / "third"), find_start(str(published)))
    assert "trained with guidance 4.5 and is sampled with 1: --sample.guidance-scale 4.5 suits it" in capsys.readouterr().out
    shutil.copytree(checkpoint, tmp_path / "torn")
    with pytest.raises(
        UserError, match="torn has a training state, but no config.json two folders up: copy the whole run folder"
    ):
        find_start(str(tmp_path / "torn"))
    with pytest.raises(UserError, match="--lora-rank 32 --lora-alpha 64"):
        train(job, dataclasses.replace(config, lora_rank=8), find_start(str(published)))


@pytest.mark.parametrize(
    "change,says",
    [
        (dict(lora_rank=16), "--lora-rank was 32"),
        (dict(seed=1), "--seed was 6"),
        (dict(run_name="other"), "--run-name was None"),
        (dict(preset="sd35-medium-24gb"), "--preset was tiny"),
        (dict(total_pairs_per_epoch=7), "--total-pairs-per-epoch was 6"),
        (dict(sample=SampleConfig(num_solver_steps=5, resolution=64)), "--sample.num-solver-steps was 4"),
    ],
)
def test_resume_with_changed_numbers_is_refused(job: Job, tmp_path: Path, change: dict, says: str):
    config = small(tmp_path)
    run = train(job, config).folder
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=says):
        train(job, dataclasses.replace(config, num_epochs=2, **change), find_start(str(run)))
    assert sorted(tmp_path.rglob("*")) == before


def test_resume_with_other_prompts_to_train_on_is_refused(job: Job, tmp_path: Path):
    """The held-out ones are the same, and the others are too but for their order."""
    file, prompts = tmp_path / "prompts.txt", load_prompts("tiny")[:8]
    file.write_text("\n".join(prompts))
    config = small(tmp_path / "runs", prompt_set=str(file))
    run = train(job, config).folder
    file.write_text("\n".join(reversed(prompts)))
    with pytest.raises(UserError, match="prompts to train on are not those of .*epoch-0000001: restore the prompt file"):
        train(job, dataclasses.replace(config, num_epochs=2), find_start(str(run)))


def test_resume_of_a_finished_run_says_so(job: Job, tmp_path: Path):
    config = small(tmp_path)
    run = train(job, config).folder
    with pytest.raises(UserError, match="has 1 epochs already: give a larger --num-epochs"):
        train(job, config, find_start(str(run)))


def test_an_update_that_moves_nothing_stops_the_run(job: Job, tmp_path: Path):
    with pytest.raises(UserError, match="left the adapter where it was"):
        train(job, small(tmp_path, train=OptimConfig(learning_rate=1e-45)))


def test_the_log_is_strict_json(tmp_path: Path):
    log = RunLog(tmp_path, TINY, (0, 0), main=True)
    log.write("step", 1, loss=float("nan"), scores={"scene": float("inf")}, grad_norm=1.5)
    assert log_of(tmp_path) == [{"kind": "step", "epoch": 1, "loss": None, "scores": {"scene": None}, "grad_norm": 1.5}]


def test_weights_and_biases_goes_on_in_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The real client, offline: a run, and its resumption under the same id."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for epochs_done in (0, 1):
        log = RunLog(tmp_path, dataclasses.replace(TINY, log_wandb=True), (epochs_done, 0), main=True)
        log.write("epoch", epochs_done + 1, reward_mean=1.0, scores={"scene": 1.0})
        ids.append(log.wandb.id)
        log.close()
    assert ids[0] == ids[1] == (tmp_path / "wandb_id.txt").read_text().strip()
    assert len(log_of(tmp_path)) == 2 and list(tmp_path.rglob("*.wandb"))


def test_an_unfinished_checkpoint_is_never_taken(job: Job, tmp_path: Path):
    config = small(tmp_path, num_epochs=2, save_freq=1)
    run = train(job, config).folder
    newest = run / "checkpoints" / "epoch-0000002"
    newest.rename(run / "checkpoints" / ".epoch-0000002.partial")
    assert find_checkpoint(str(run)).folder.name == "epoch-0000001"


@pytest.mark.parametrize(
    "changes",
    [
        dict(churn=ChurnConfig("interval")),
        dict(churn=ChurnConfig("prior")),
        dict(train=dataclasses.replace(TINY.train, kl_weight=0.5)),
        dict(sample=SampleConfig(num_solver_steps=4, resolution=64, guidance_scale=2.0)),
        dict(reward_specs=("own_scorers:Brightness=1.0", "scene=0.1")),
        dict(memory_efficient=True, gradient_steps_per_epoch=1),
    ],
    ids=["interval", "prior", "kl", "guidance", "own scorer", "memory"],
)
def test_options_train(job: Job, tmp_path: Path, changes: dict):
    run = train(job, small(tmp_path, num_epochs=2, **changes))
    assert all(step["applied"] for step in log_of(run.folder, "step"))


@pytest.mark.parametrize("term, weight, dR", [("kl_weight", 1.0, 0.0), ("proximal_weight", 1e4, 1e-4)])
def test_a_term_pulls_back_to_the_velocity_of_the_base_or_of_the_sampling(
    job: Job, tmp_path: Path, term: str, weight: float, dR: float
):
    """With the term alone (no reward difference left, or next to none), a displaced adapter gets a gradient that lowers the distance."""
    config = small(tmp_path, train=OptimConfig(learning_rate=1e-3, **{term: weight}))
    run, data = first_rollout(job, config)
    with torch.no_grad():
        for _, parameter in run.model.named_trainable():
            parameter.add_(0.01)
    data.differences.dR.fill_(dR)
    losses = []
    for samples in step_samples(run.plan, config, 0, range(6)) * 3:
        stats = optimizer_step(job, run.learner, data, samples)
        losses.append(stats.loss)
    assert losses[0] > 0 and losses[-1] < 0.7 * losses[0]


def first_rollout(job: Job, config: TrainConfig) -> tuple[Run, EpochData]:
    """Everything up to the first update."""
    run: Run = prepare(job, config, FRESH)
    prompts = run.prompts[: config.total_pairs_per_epoch]
    share = PairShare(0, range(len(prompts)), prompts, *run.model.encode_prompts(prompts, config.sample.guidance_scale))
    rollout = sample_share(run.model, config, run.plan, share)
    differences = score_share(rollout, run.model.decode(rollout.final), run.judges.reward)
    return run, EpochData(run.model, config, run.plan, rollout, differences)


@pytest.mark.parametrize("forward_process", [False, True])
def test_the_proximal_term_fits_a_reward_of_any_scale(job: Job, tmp_path: Path, forward_process: bool):
    config = small(tmp_path, train=OptimConfig(proximal_weight=5.0, forward_process=forward_process))
    run, data = first_rollout(job, config)
    with torch.no_grad():
        for _, parameter in run.model.named_trainable():
            parameter.add_(0.01)
        sigmas, batch = run.model.sigmas(4, 64), torch.arange(8)
        loss, _ = micro_batch_loss(data, sigmas, batch)
        assert loss.abs().min() > 0
        data.differences.dR.mul_(100)
        larger, _ = micro_batch_loss(data, sigmas, batch)
    torch.testing.assert_close(larger, 100 * loss)


def test_sampling_and_training_must_agree(job: Job, tmp_path: Path):
    config = small(tmp_path)
    run, data = first_rollout(job, config)
    with torch.no_grad():
        run.model.pipe.transformer.proj_out.weight.mul_(1.01)
    stats = optimizer_step(job, run.learner, data, step_samples(run.plan, config, 0, range(6))[0])
    with pytest.raises(UserError, match="sampling and training disagree"):
        check_ratio(stats.ratio_first, config.precision)


def test_the_ratio_of_the_worst_process_counts():
    assert farthest_ratio([1.0, 1.001, 0.9]) == 0.9 and math.isnan(farthest_ratio([3.0, math.nan]))


@pytest.mark.parametrize("name,says", [("Constant", "the same score 7.0"), ("NotANumber", "not finite")])
def test_dead_scorers_stop_the_run_before_the_first_update(job: Job, tmp_path: Path, name: str, says: str):
    with pytest.raises(UserError, match=f"own_scorers:{name} gave .*{says}"):
        train(job, small(tmp_path, reward_specs=(f"own_scorers:{name}=1",)))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_later_score_that_is_not_finite_drops_its_pair(job: Job, tmp_path: Path):
    run = train(job, small(tmp_path, num_epochs=3, reward_specs=("own_scorers:FailsLater=1",)))
    assert [epoch["dropped_pairs"] for epoch in log_of(run.folder, "epoch")] == [0, 1, 1]
    assert all(step["applied"] for step in log_of(run.folder, "step"))
    assert all(parameter.isfinite().all() for parameter in run.model.trainable())


@pytest.mark.parametrize(
    "name,says",
    [("NeverAgain", "In epoch 2 no pair .* own_scorers:NeverAgain gives scores"), ("Huge", "No optimizer step of epoch 1")],
)
def test_a_run_that_has_broken_stops(job: Job, tmp_path: Path, name: str, says: str):
    with pytest.raises(UserError, match=says):
        train(job, small(tmp_path, num_epochs=3, save_freq=1, reward_specs=(f"own_scorers:{name}=1",)))


def test_broken_latents_drop_their_pair(job: Job, tmp_path: Path):
    config = small(tmp_path)
    run, data = first_rollout(job, config)
    rollout = data.rollout
    rollout.final[3] = float("nan")
    rollout.velocities[12:16] = rollout.xs[12:16] = float("nan")  # the four steps of trajectory 3
    differences = score_share(rollout, torch.rand(12, 3, 64, 64), run.judges.reward)
    assert differences.dropped.tolist() == [False, False, True, True] + [False] * 8
    data, samples = dataclasses.replace(data, differences=differences), torch.arange(48)
    stats = optimizer_step(job, run.learner, data, StepSamples(samples, 48))
    assert stats.applied and torch.isfinite(torch.tensor(stats.loss)) and stats.ratio_mean == pytest.approx(1)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(job: Job, tmp_path: Path):
    config = small(tmp_path)
    run, data = first_rollout(job, config)
    before = {name: p.clone() for name, p in run.model.named_trainable()}
    data.rollout.velocities[:4] = float("inf")
    samples = torch.arange(12)  # trajectories 0 to 2, the first of them broken
    stats = optimizer_step(job, run.learner, data, StepSamples(samples, 12))
    assert not stats.applied
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_trainable())


def test_a_rank_without_samples_in_a_step_takes_part(job: Job, tmp_path: Path):
    config = small(tmp_path)
    run, data = first_rollout(job, config)
    none = torch.empty(0, dtype=torch.long)
    stats = optimizer_step(job, run.learner, data, StepSamples(none, 5))
    assert stats.applied and stats.grad_norm == 0


def test_going_on_from_an_earlier_checkpoint_sets_later_ones_aside(job: Job, tmp_path: Path):
    config = small(tmp_path, num_epochs=3, save_freq=1)
    run = train(job, config).folder
    kept = load_file(run / "checkpoints" / "epoch-0000002" / "adapter_model.safetensors")
    changed = dataclasses.replace(config, num_epochs=2)
    train(job, changed, find_start(str(run / "checkpoints" / "epoch-0000001")))
    assert find_checkpoint(str(run)).folder.name == "epoch-0000002"
    again = load_file(run / "checkpoints" / "epoch-0000002" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert len(list((run / "checkpoints").glob("abandoned-*"))) == 2
    assert read_config(run).num_epochs == 2


def test_every_sample_is_trained_once_an_epoch(job: Job, tmp_path: Path):
    config = small(tmp_path, total_pairs_per_epoch=7)
    plan = prepare(job, config, FRESH).plan
    seen = torch.cat([samples.own for samples in step_samples(plan, config, 0, range(7))])
    assert sorted(seen.tolist()) == list(range(7 * 2 * 4))
    parts = [step_samples(plan, config, 0, pairs) for pairs in (range(0, 2), range(2, 7))]
    for step, samples in enumerate(step_samples(plan, config, 0, range(7))):
        shifted = torch.cat([parts[0][step].own, parts[1][step].own + 2 * 2 * 4])
        assert samples.total == parts[0][step].total == len(samples.own) and sorted(shifted.tolist()) == sorted(
            samples.own.tolist()
        )
    again = step_samples(plan, config, 1, range(7))[0].own
    assert again.tolist() != step_samples(plan, config, 0, range(7))[0].own.tolist()


def test_loss_scale_backs_off_and_recovers():
    scale = LossScale.start("fp16")
    assert scale.value == 2.0**28 and scale.overflowed() and scale.value == 2.0**27
    for _ in range(LossScale.GROWTH_INTERVAL):
        scale.succeeded()
    assert scale.value == 2.0**28
    assert LossScale.start("fp32").value == 1 and not LossScale.start("bf16").overflowed()


def test_loss_scale_recovers_from_the_bottom():
    scale = LossScale.start("fp16")
    while scale.overflowed():
        pass
    assert scale.value == 1
    for _ in range(LossScale.GROWTH_INTERVAL):
        scale.succeeded()
    assert scale.value == 2


def test_damaged_training_state_is_refused(job: Job, tmp_path: Path):
    config = small(tmp_path)
    run = train(job, config)
    folder = run.folder / "checkpoints" / "epoch-0000001"
    for name in ("training_state.safetensors", "training_state.json"):
        intact = (folder / name).read_bytes()
        (folder / name).write_bytes(intact[: len(intact) // 2])
        with pytest.raises(UserError, match="damaged"):
            train(job, dataclasses.replace(config, num_epochs=2), find_start(str(folder)))
        (folder / name).write_bytes(intact)
