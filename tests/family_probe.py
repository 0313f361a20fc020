"""Run on several processes by test_family_runs.py: trains each of some models, whole and spread over the processes; saves the adapters.

torchrun --nproc_per_node=K tests/family_probe.py OUT.pt RUNS_DIR MODEL...
"""

import sys
from pathlib import Path

import torch
from test_family_runs import few
from torch.distributed.tensor import DTensor

import fdfo.method.prepare
from fdfo.distributed.launch import run_command_line, start_job
from fdfo.method.trainer import train


def main(out: str, runs_dir: str, *models: str) -> None:
    with start_job() as job:
        found = []
        for model in models:
            for sharded in (False, True):
                fdfo.method.prepare.needs_sharding = lambda job, modules, sharded=sharded: sharded
                run = train(job, few(Path(runs_dir), model))
                found.append(torch.cat([p.detach().flatten() for p in run.model.trainable()]))
            shards = [p for p in run.model.pipe.transformer.parameters() if isinstance(p, DTensor)]
            assert shards and sum(p.to_local().numel() for p in shards) < 0.6 * sum(p.numel() for p in shards)
        if job.is_main:
            torch.save(found, out)


if __name__ == "__main__":
    run_command_line(lambda: main(*sys.argv[1:]))
