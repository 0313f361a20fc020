"""Command lines, presets, derived plans and config.json."""

import dataclasses
from pathlib import Path

import pytest

from fdfo.config.command_line import flag_value, parse_train_config
from fdfo.config.errors import UserError
from fdfo.config.options import check_options, deciding_settings, flat, from_json, to_json
from fdfo.config.plan import plan_batches, plan_churn
from fdfo.config.presets import PRESETS
from fdfo.config.train_options import ChurnConfig, SampleConfig, TrainConfig
from fdfo.storage.prompts import epoch_prompts, load_prompts
from fdfo.tiny.scenes import is_held_out, parse_caption, tiny_prompt_sets


def test_defaults_are_those_of_the_method():
    config = parse_train_config([])
    assert config == TrainConfig()
    assert (config.total_pairs_per_epoch, config.gradient_steps_per_epoch, config.sample.num_solver_steps) == (432, 4, 40)
    assert (config.train.learning_rate, config.train.clip_range, config.train.adam_weight_decay) == (3e-5, 0.03, 1e-4)
    assert (config.lora_rank, config.lora_alpha, config.precision, config.reward_preset) == (32, 64, "fp16", "combined")
    assert plan_churn(config.churn) == {"weight": 0.0025}


def test_flags_win_over_the_preset_wherever_they_stand():
    for argv in (["--preset", "tiny", "--seed", "9"], ["--seed", "9", "--preset=tiny"]):
        assert parse_train_config(argv) == dataclasses.replace(PRESETS["tiny"], seed=9)


def test_flags_are_read_as_tyro_reads_them():
    argv = ["--preset=tiny", "--resume_from", "a", "--resume-from=b"]
    assert flag_value(argv, "--resume-from") == parse_train_config(argv).resume_from == "b"
    assert flag_value(["--resume-from"], "--resume-from") == flag_value([], "--preset") == ""


@pytest.mark.parametrize("pairs,world", [(432, 1), (432, 8), (431, 8), (16, 3), (7, 7), (100, 13)])
def test_batch_plan_covers_every_pair_once(pairs: int, world: int):
    plan = plan_batches(TrainConfig(total_pairs_per_epoch=pairs), world)
    largest = 13 if world >= 8 else 6
    assert sum(plan.pairs) == pairs and max(plan.pairs) - min(plan.pairs) <= 1
    assert 1 <= plan.sample_batch <= largest and 1 <= plan.train_batch <= largest
    assert plan.samples == 2 * pairs * 40


def test_batch_plan_of_the_published_layouts():
    assert plan_batches(TrainConfig(), 4).sample_batch == 6
    assert (plan_batches(TrainConfig(), 8).train_batch, plan_batches(TrainConfig(), 8).sample_batch) == (12, 12)
    assert plan_batches(TrainConfig(sample=SampleConfig(batch_size=5)), 4).sample_batch == 5


@pytest.mark.parametrize(
    "config,world,says",
    [
        (TrainConfig(total_pairs_per_epoch=2), 3, "start 2 or fewer"),
        (TrainConfig(total_pairs_per_epoch=1, gradient_steps_per_epoch=81), 1, "--gradient-steps-per-epoch"),
        (TrainConfig(sample=SampleConfig(batch_size=7)), 1, "--max-batch-size 6"),
    ],
)
def test_batch_sizes_that_cannot_be_met(config: TrainConfig, world: int, says: str):
    with pytest.raises(UserError, match=says):
        plan_batches(config, world)


@pytest.mark.parametrize(
    "config,says",
    [
        (TrainConfig(max_batch_size=0), "--max-batch-size is 0: it should be greater than or equal to 1"),
        (TrainConfig(sample=SampleConfig(resolution=500)), "--sample.resolution is 500: it should be a multiple of 16"),
        (TrainConfig(churn=ChurnConfig(weight=float("nan"))), "--churn.weight is nan: it should be a finite number"),
        (TrainConfig(run_name="a/b"), "--run-name is 'a/b': it should match pattern"),
        (TrainConfig(resume_from=""), "--resume-from is '': it should have at least 1 character"),
    ],
)
def test_values_out_of_bounds_are_named(config: TrainConfig, says: str):
    with pytest.raises(UserError, match=says.replace("(", "[(]")):
        check_options(config)


def test_settings_that_do_not_affect_results_may_change():
    free = dict(num_epochs=7, keep_last=1, max_batch_size=2, runs_dir=Path("x"), offload_scorers=True, eval_every=3)
    sample = dataclasses.replace(TrainConfig().sample, batch_size=3)
    assert deciding_settings(TrainConfig(**free, sample=sample)) == deciding_settings(TrainConfig())
    assert set(flat(deciding_settings(TrainConfig()))) >= {"seed", "train.learning_rate", "sample.guidance_scale", "eval_metrics"}


def test_churn_numbers_default_by_schedule():
    assert plan_churn(ChurnConfig("interval"))["soft_sd"] == 0.25
    assert plan_churn(ChurnConfig("prior", weight=0.3)) == {"weight": 0.3, "weight_sd": 1.0}
    with pytest.raises(UserError, match="no effect with --churn.schedule raw"):
        plan_churn(ChurnConfig("raw", mu=1.0))


def test_config_json_reads_back():
    for config in (PRESETS["tiny"], PRESETS["tiny-published"], TrainConfig(reward_specs=("pickscore=1.0",), run_name="x")):
        assert from_json(TrainConfig, to_json(config), "here") == config


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"nonsense": 1}',
        '{"sample": 3}',
        "null",
        '{"seed": "6"}',
        '{"precision": "fp8"}',
        '{"reward_specs": "scene=1"}',
        '{"seed": true}',
    ],
)
def test_a_foreign_config_json_is_refused(text: str):
    with pytest.raises(UserError, match="config.json"):
        from_json(TrainConfig, text, "config.json")


def test_prompts_are_walked_without_replacement_across_epochs():
    prompts = [f"prompt {i}" for i in range(25)]
    walk = [prompt for epoch in range(10) for prompt in epoch_prompts(prompts, epoch, 10, seed=6)]
    for lap in range(4):
        assert sorted(walk[25 * lap : 25 * (lap + 1)]) == sorted(prompts)
    assert walk[:25] != walk[25:50]
    assert epoch_prompts(prompts, 3, 10, seed=6) == walk[30:40]
    assert epoch_prompts(prompts, 0, 10, seed=7) != walk[:10]


def test_bundled_prompt_sets():
    training, held_out = load_prompts("tiny"), load_prompts("tiny_heldout")
    assert (training, held_out) == tiny_prompt_sets()
    assert not any(map(is_held_out, training)) and all(map(is_held_out, held_out))
    for caption in training[:200] + held_out:
        assert parse_caption(caption).caption() == caption
    assert len(load_prompts("showcase")) == 15
