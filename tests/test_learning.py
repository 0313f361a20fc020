"""The point of it all, in short: a few epochs raise the reward of held-out captions. benchmarks/learning.py has it at length."""

import dataclasses
from pathlib import Path

from fdfo.comparison import compare_with_base
from fdfo.config import PRESETS
from fdfo.distributed import Job
from fdfo.trainer import train


def test_a_few_epochs_raise_the_held_out_reward(job: Job, tmp_path: Path):
    tiny = PRESETS["tiny"]
    config = dataclasses.replace(
        tiny,
        train=dataclasses.replace(tiny.train, learning_rate=4e-4),
        total_pairs_per_epoch=64,
        num_epochs=8,
        heldout_prompts=128,
        runs_dir=tmp_path,
    )
    run = train(job, config, None)
    scene, clip = compare_with_base(job, run.model, config, run.heldout, run.folder)
    print(scene.describe(), clip.describe(), sep="\n")
    assert scene.metric == "scene" and scene.count == 128
    assert scene.after - scene.before > 2 * scene.error
    assert clip.after > clip.before
    assert (run.folder / "before_after.png").stat().st_size > 10_000
