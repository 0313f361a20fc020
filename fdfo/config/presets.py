"""The presets of train.py: sets of defaults, and what changes in them where people judge."""

import dataclasses

from fdfo.config.train_options import KLEIN_4B, SD35_LARGE, Z_IMAGE, ChurnConfig, OptimConfig, SampleConfig, TrainConfig

SMALL_GPU = {"gradient_checkpointing": True, "offload_scorers": True, "offload_trajectories": True}
SMALL_JUDGE = {"vlm_model_name": "qwenvl-3b", "vlm_use_fsdp": False}
# Learning rate, clip range and churn of the bases but Stable Diffusion 3.5 Medium are untried on real weights (docs/bases.md).
# With 10 instead of 40 solver steps, four times the churn a step parts the branches as far.
TEN_STEPS = {"sample": SampleConfig(num_solver_steps=10), "churn": ChurnConfig(weight=0.01)}

SUBSET = OptimConfig(steps_per_trajectory=5, branches="one")  # a sixteenth of 40 steps of both branches

TINY_PUBLISHED = TrainConfig(
    preset="tiny-published",
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
)
# Faster on the bundled model, and off everywhere else (docs/gap.md).
FORWARD_PROCESS = OptimConfig(learning_rate=1e-3, clip_range=0.2, forward_process=True, proximal_weight=5.0)

PRESETS = {
    "sd35-medium": TrainConfig(),
    "sd35-medium-fast": TrainConfig(preset="sd35-medium-fast", train=SUBSET),
    "sd35-medium-24gb": TrainConfig(
        preset="sd35-medium-24gb",
        train=SUBSET,
        **SMALL_JUDGE,
        **SMALL_GPU,
        max_batch_size=4,
    ),
    "sd35-large": TrainConfig(
        preset="sd35-large",
        pretrained_model=SD35_LARGE,
        **SMALL_GPU,
        max_batch_size=6,
    ),
    "flux2-klein": TrainConfig(
        preset="flux2-klein",
        pretrained_model=KLEIN_4B,
        precision="bf16",
        **TEN_STEPS,
        **SMALL_JUDGE,
        **SMALL_GPU,
        max_batch_size=4,
    ),
    "z-image": TrainConfig(
        preset="z-image",
        pretrained_model=Z_IMAGE,
        precision="bf16",
        **TEN_STEPS,
        **SMALL_GPU,
        max_batch_size=6,
    ),
    "tiny-published": TINY_PUBLISHED,
    "tiny": dataclasses.replace(TINY_PUBLISHED, preset="tiny", train=FORWARD_PROCESS),
}
HUMAN = "human"  # the reward


def judged_by_people(config: TrainConfig) -> bool:
    """Return whether people are part of the reward."""
    names = [spec.rpartition("=")[0] for spec in config.reward_specs] or [config.reward_preset]
    return HUMAN in names


def for_people(preset: TrainConfig) -> TrainConfig:
    """Return a preset with the defaults for people: epochs that they can judge, and after each a checkpoint and an evaluation.

    The bundled model trains as published with them: from the votes of a simulated person it learns more that way
    (docs/human_simulated.md).
    """
    tiny = preset.pretrained_model == "tiny"
    return dataclasses.replace(
        preset, total_pairs_per_epoch=64, num_epochs=10 if tiny else 50, save_freq=1, eval_every=1 if tiny else 5,
        train=dataclasses.replace(TINY_PUBLISHED.train, learning_rate=5e-4) if tiny else preset.train,
        eval_metrics=("scene", *preset.eval_metrics) if tiny else preset.eval_metrics,
    )  # fmt: skip
