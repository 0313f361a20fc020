"""The point of it all, in short: a few epochs raise the reward of held-out captions. benchmarks/learning.py has it at length."""

import dataclasses
from pathlib import Path

from fdfo.config.presets import PRESETS
from fdfo.distributed.job import Job
from fdfo.evaluation.best_checkpoint import change
from fdfo.evaluation.statistics import evaluation_of
from fdfo.method.trainer import train


def test_a_few_epochs_raise_the_held_out_reward(job: Job, tmp_path: Path):
    tiny = PRESETS["tiny-published"]
    config = dataclasses.replace(
        tiny,
        train=dataclasses.replace(tiny.train, learning_rate=5e-4),
        total_pairs_per_epoch=64,
        num_epochs=5,
        eval_every=5,
        runs_dir=tmp_path,
    )
    first, last = map(evaluation_of, train(job, config).log.evaluations)
    scene, clip = change("scene", first, last), change("scene_clip", first, last)
    print(scene, clip, sep="\n")
    assert scene.count == 128
    assert scene.difference > 2 * scene.error
    assert clip.difference > 0
