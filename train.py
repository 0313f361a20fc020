"""Train a LoRA of Stable Diffusion 3.5 Medium (or of the bundled tiny model) with a reward.

python train.py --preset tiny                          # a laptop: no GPU, no download, a few minutes
python train.py --num-epochs 5 --total-pairs-per-epoch 16
torchrun --nproc_per_node=8 train.py --reward-preset pickscore
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fdfo.command_line import check_own_code, flag_value, parse_train_config, timeout_minutes
from fdfo.config import TrainConfig, UserError
from fdfo.distributed import Job, check_device, run_command_line, start_job

if TYPE_CHECKING:
    from fdfo.checkpoint import Checkpoint

# Diffusers and PEFT take seconds to import: they come in the functions below, so that --help and mistakes answer at once.


def main() -> None:
    argv = sys.argv[1:]
    with start_job(timeout_minutes(argv)) as job:
        config, checkpoint, started = read_command_line(job, argv)
        check_device(config.precision, job.device)
        train_and_report(job, config, checkpoint, started)


def read_command_line(job: Job, argv: list[str]) -> "tuple[TrainConfig, Checkpoint | None, Path | None]":
    """The config, over that of the run to resume where one is named; the checkpoint, or the run folder, to go on from."""
    resume_from = flag_value(argv, "--resume-from")
    if not resume_from:
        return parse_train_config(argv, quiet=not job.is_main), None, None
    from fdfo.checkpoint import AUTO, find_own_run, find_run_checkpoint, saved_config

    if resume_from == AUTO:
        config = parse_train_config(argv, quiet=not job.is_main)
        return config, *job.on_main(lambda: find_own_run(config))
    checkpoint = job.on_main(lambda: find_run_checkpoint(resume_from))
    saved = saved_config(checkpoint) if checkpoint.resumable else None
    config = parse_train_config(argv, saved, quiet=not job.is_main)
    assert config.resume_from == resume_from
    if saved is not None:
        check_own_code(argv, config)
        if flag_value(argv, "--runs-dir") and config.runs_dir.resolve() != checkpoint.run.parent:
            raise UserError(f"--runs-dir has no effect on a run that goes on in {checkpoint.run}: leave it out.")
    return config, checkpoint, None


def train_and_report(job: Job, config: TrainConfig, checkpoint: "Checkpoint | None", started: Path | None) -> None:
    """Trains, and says what it led to."""
    from fdfo.console import report_end
    from fdfo.preemption import Stopped
    from fdfo.trainer import train

    try:
        run = train(job, config, checkpoint, started)
    except Stopped:  # told already, and no mistake: exit code 0
        return
    report_end(job, run)
    run.log.close()


if __name__ == "__main__":
    run_command_line(main)
