"""Train a LoRA of Stable Diffusion 3.5 Medium (or of the bundled tiny model) with a reward.

python train.py --preset tiny                          # a laptop: no GPU, no download, a few minutes
python train.py --num-epochs 5 --total-pairs-per-epoch 16
torchrun --nproc_per_node=8 train.py --reward-preset pickscore
"""

import sys
from typing import TYPE_CHECKING

from fdfo.command_line import flag_value, parse_train_config
from fdfo.config import TrainConfig
from fdfo.distributed import Job, check_device, exit_on_user_error, start_job

if TYPE_CHECKING:
    from fdfo.checkpoint import Checkpoint

# Diffusers and PEFT take seconds to import: they come in the functions below, so that --help and mistakes answer at once.


def main() -> None:
    argv = sys.argv[1:]
    with start_job() as job:
        checkpoint, saved = None, None
        if resume_from := flag_value(argv, "--resume-from"):
            from fdfo.checkpoint import find_checkpoint, saved_config

            checkpoint = job.on_main(lambda: find_checkpoint(resume_from))
            saved = saved_config(checkpoint) if checkpoint.resumable else None
        config = parse_train_config(argv, saved, quiet=not job.is_main)
        check_device(config.precision, job.device)
        assert (config.resume_from or "") == resume_from
        train_and_compare(job, config, checkpoint)


def train_and_compare(job: Job, config: TrainConfig, checkpoint: "Checkpoint | None") -> None:
    """Trains, says where everything is, and compares base and adapter where there are held-out prompts."""
    from fdfo.comparison import compare_with_base
    from fdfo.trainer import train

    run = train(job, config, checkpoint)
    job.print(f"run: {run.folder}\nlog: {run.folder / 'training_log.jsonl'}")
    if config.heldout_prompt_set is not None:
        comparisons = compare_with_base(job, run.model, config, run.heldout, run.folder)
        job.print(f"before and after: {run.folder / 'before_after.png'}")
        for comparison in comparisons:
            run.log.write("heldout", run.epochs_done, **vars(comparison))
            job.print(comparison.describe())
    run.log.close()


if __name__ == "__main__":
    exit_on_user_error(main)
