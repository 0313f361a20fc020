"""Train a LoRA of Stable Diffusion 3.5 Medium (or of the bundled tiny model) with a reward.

python train.py --preset tiny                          # a laptop: no GPU, no download, a few minutes
python train.py --num-epochs 5 --total-pairs-per-epoch 16
torchrun --nproc_per_node=8 train.py --reward-preset pickscore
"""

import sys
from typing import TYPE_CHECKING

from fdfo.config.command_line import check_own_code, flag_value, parse_train_config, timeout_minutes
from fdfo.config.errors import UserError, or_warn
from fdfo.config.options import flag_of
from fdfo.config.train_options import TrainConfig
from fdfo.distributed.job import Job
from fdfo.distributed.launch import check_device, run_command_line, start_job

if TYPE_CHECKING:
    from fdfo.run_folder.start import Start

# Diffusers and PEFT take seconds to import. They are imported in the functions below, so that --help and mistakes answer at once.


def main() -> None:
    argv = sys.argv[1:]
    with start_job(timeout_minutes(argv)) as job:
        config, start = job.on_main(lambda: read_command_line(argv))
        check_device(config.precision, job.device)
        train_and_report(job, config, start)


def read_command_line(argv: list[str]) -> "tuple[TrainConfig, Start | None]":
    """Return the settings, over those of the run to resume if one is named, and how the run starts. Raises UserError."""
    resume_from = flag_value(argv, "--resume-from")
    if not resume_from:
        return parse_train_config(argv), None
    from fdfo.run_folder.find_checkpoint import read_config
    from fdfo.run_folder.start import AUTO, find_auto_start, find_start, with_lora_of

    if resume_from == AUTO:
        config = parse_train_config(argv)
        return config, find_auto_start(config)
    start = find_start(resume_from)
    if not start.resumed:
        given = [name for name in ("lora_rank", "lora_alpha") if flag_value(argv, flag_of(name))]
        return with_lora_of(parse_train_config(argv), start, given), start
    config = parse_train_config(argv, read_config(start.run))
    check_own_code(argv, config)
    if flag_value(argv, "--runs-dir") and config.runs_dir.resolve() != start.run.parent:
        raise UserError(f"--runs-dir has no effect on a run that continues in {start.run}: leave it out.")
    return config, start


def train_and_report(job: Job, config: TrainConfig, start: "Start | None") -> None:
    """Train, and print what it led to."""
    from fdfo.distributed.shutdown import Stopped
    from fdfo.evaluation.record import newest_evaluation
    from fdfo.method.trainer import train
    from fdfo.report.console import print_end
    from fdfo.report.html import write_report
    from fdfo.run_folder.start import FRESH

    try:
        run = train(job, config, start or FRESH)
    except Stopped:  # printed already, and no mistake: exit code 0
        return
    if job.is_main:
        newest = newest_evaluation(run.log) if run.held_out is not None else None
        print_end(run.folder, or_warn(lambda: write_report(run.folder)), newest)
    run.log.close()


if __name__ == "__main__":
    run_command_line(main)
