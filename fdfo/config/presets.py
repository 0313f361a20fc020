"""The presets of train.py: sets of defaults, and what changes in them where people judge."""

import dataclasses

from fdfo.config.train_options import ChurnConfig, OptimConfig, SampleConfig, TrainConfig

PRESETS = {
    "sd35-medium": TrainConfig(),
    "sd35-medium-fast": TrainConfig(preset="sd35-medium-fast", train=OptimConfig(steps_per_trajectory=5, branches="one")),
    "sd35-medium-24gb": TrainConfig(
        preset="sd35-medium-24gb",
        vlm_model_name="qwenvl-3b",
        vlm_use_fsdp=False,
        gradient_checkpointing=True,
        offload_scorers=True,
        offload_trajectories=True,
        max_batch_size=4,
    ),
    "tiny": TrainConfig(
        preset="tiny",
        sample=SampleConfig(num_solver_steps=8, resolution=64),
        train=OptimConfig(learning_rate=2e-4, clip_range=0.2),
        churn=ChurnConfig(weight=0.02),
        num_epochs=20,
        memory_efficient=False,
        pretrained_model="tiny",
        prompt_set="tiny",
        total_pairs_per_epoch=128,
        max_batch_size=256,
        reward_preset="scene",
        precision="fp32",
        compile=False,
        eval_every=5,
        eval_prompt_set="tiny_heldout",
        eval_metrics=("scene_clip", "pixel_diversity"),
    ),
}
HUMAN = "human"  # the reward


def judged_by_people(config: TrainConfig) -> bool:
    """Return whether people are part of the reward."""
    names = [spec.rpartition("=")[0] for spec in config.reward_specs] or [config.reward_preset]
    return HUMAN in names


def for_people(preset: TrainConfig) -> TrainConfig:
    """Return a preset with the defaults for people: epochs that they can judge, and after each a checkpoint and an evaluation."""
    tiny = preset.preset == "tiny"
    return dataclasses.replace(
        preset, total_pairs_per_epoch=64, num_epochs=10 if tiny else 50, save_freq=1, eval_every=1 if tiny else 5,
        train=dataclasses.replace(preset.train, learning_rate=5e-4) if tiny else preset.train,
        eval_metrics=("scene", *preset.eval_metrics) if tiny else preset.eval_metrics,
    )  # fmt: skip
