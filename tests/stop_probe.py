"""Run under torchrun by test_stopping.py: a run stopped in five stages, by a signal to one rank, has the adapter of a straight one.

torchrun --nproc_per_node=2 tests/stop_probe.py RUNS_DIR
"""

import contextlib
import dataclasses
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from signal_inside import signal_inside
from test_training import comparable, log_of

from fdfo.config.presets import PRESETS
from fdfo.config.train_options import SampleConfig
from fdfo.distributed.launch import run_command_line, start_job
from fdfo.distributed.shutdown import Stopped
from fdfo.method.trainer import train
from fdfo.run_folder.find_checkpoint import all_checkpoints
from fdfo.run_folder.start import FRESH, find_start

STAGES = {
    "sample_share": 0,
    "score_share": 1,
    "reduce_gradient": 1,
    "save_checkpoint": 0,
    "draw_held_out": 1,
}  # and the rank to be sent it


def main(runs_dir: Path) -> None:
    config = dataclasses.replace(
        PRESETS["tiny-published"], sample=SampleConfig(num_solver_steps=4, resolution=64), total_pairs_per_epoch=3, num_epochs=6, save_freq=1,
        eval_prompts=2, eval_every=5, runs_dir=runs_dir / "straight",
    )  # fmt: skip
    with start_job() as job:
        straight = train(job, config).folder
        parts = dataclasses.replace(config, runs_dir=runs_dir / "parts")
        run = parts.runs_dir / straight.name
        for epochs, (stage, rank) in enumerate(STAGES.items(), start=1):
            start = job.on_main(lambda: find_start(str(run))) if epochs > 1 else FRESH
            armed = (run / "checkpoints" / f"epoch-000000{epochs}").is_dir
            sender = signal_inside(stage, signal.SIGTERM, armed) if job.rank == rank else contextlib.nullcontext()
            try:
                with sender:
                    train(job, parts, start)
            except Stopped as stopped:
                assert f"SIGTERM on rank {rank}" in str(stopped), stopped
            else:
                raise AssertionError(f"the signal in {stage} was lost")
            job.print(f"stopped in {stage}, at {all_checkpoints(run)[-1].name}" if job.is_main else "")
        train(job, parts, job.on_main(lambda: find_start(str(run))))
        one, two = (
            load_file(folder / "checkpoints" / "epoch-0000006" / "adapter_model.safetensors") for folder in (straight, run)
        )
        assert all(torch.equal(one[name], two[name]) for name in one)
        if job.is_main:
            assert [line["epoch"] for line in log_of(run, "eval")] == [0, 5, 6] and comparable(run) == comparable(straight)
        job.print("the same adapter and log")


if __name__ == "__main__":
    run_command_line(lambda: main(Path(sys.argv[1])))
