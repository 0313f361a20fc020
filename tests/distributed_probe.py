"""Run on several processes by test_distributed.py: saves what must not depend on the number of processes.

torchrun --nproc_per_node=K tests/distributed_probe.py OUT.pt RUNS_DIR PAIRS [STEPS_PER_TRAJECTORY BRANCHES]
"""

import dataclasses
import sys
from pathlib import Path

import torch

from fdfo.config.presets import PRESETS
from fdfo.config.train_options import SampleConfig
from fdfo.distributed.launch import run_command_line, start_job
from fdfo.method.prepare import prepare
from fdfo.method.rollout import FIRST_CHURN, START, PairShare, pair_gammas, sample_share, score_share, standard_normal
from fdfo.method.trainer import train
from fdfo.method.update import EpochData, accumulate_gradient, reduce_gradient, step_samples
from fdfo.run_folder.start import FRESH
from fdfo.storage.prompts import epoch_prompts


def main(out: str, runs_dir: str, pairs: int, steps: int | None = None, branches: str = "both") -> None:
    config = dataclasses.replace(
        PRESETS["tiny-published"],
        sample=SampleConfig(num_solver_steps=8, resolution=64),
        train=dataclasses.replace(PRESETS["tiny-published"].train, steps_per_trajectory=steps, branches=branches),
        total_pairs_per_epoch=pairs,
        num_epochs=2,
        eval_prompts=0,
        runs_dir=Path(runs_dir),
    )
    with start_job() as job:
        run = prepare(job, dataclasses.replace(config, runs_dir=Path(runs_dir) / "probe"), FRESH)
        own, model = job.share(pairs), run.model
        prompts = epoch_prompts(run.prompts, 1, pairs, config.seed)[own.start : own.stop]
        shape, sigmas = model.latent_shape(64), model.sigmas(8, 64)
        noise = [
            (
                standard_normal(shape, config.seed, 1, pair, START),
                standard_normal((2, *shape), config.seed, 1, pair, FIRST_CHURN + 3),
            )
            for pair in own
        ]
        gammas = pair_gammas(config, sigmas, 1, own)
        share = PairShare(1, own, prompts, *model.encode_prompts(prompts, config.sample.guidance_scale))
        rollout = sample_share(model, config, run.plan, share)
        held = rollout.xs.numel()
        differences = score_share(rollout, model.decode(rollout.final), run.judges.reward)
        samples = step_samples(run.plan, config, 1, own)[0]
        accumulate_gradient(EpochData(model, config, run.plan, rollout, differences), samples, 1.0, lambda done: False)
        reduce_gradient(job, model.trainable(), 1.0)
        gradient = torch.cat([p.grad.flatten() for p in model.trainable()])
        start = torch.cat([p.detach().flatten() for p in model.trainable()])
        finished = train(job, config)
        end = torch.cat([p.detach().flatten() for p in finished.model.trainable()])
        first = 2 * own.start  # trajectories are counted on this rank
        drawn = torch.stack([rollout.samples.trajectory + first, rollout.samples.step], dim=1).tolist()
        dealt = [drawn[place] for place in samples.own.tolist()]
        parts = job.gather_objects(
            {"prompts": prompts, "noise": noise, "gammas": gammas, "held": held, "drawn": drawn, "dealt": dealt}
        )
        if job.is_main:
            torch.save({"parts": parts, "gradient": gradient, "start": start, "end": end}, out)


if __name__ == "__main__":
    steps = int(sys.argv[4]) if len(sys.argv) > 4 else None
    run_command_line(lambda: main(sys.argv[1], sys.argv[2], int(sys.argv[3]), steps, *sys.argv[5:]))
