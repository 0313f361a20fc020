"""Train a LoRA of Stable Diffusion 3.5 Medium (or of the bundled tiny model) with a reward.

    python train.py --preset tiny                          # a laptop: no GPU, no download, a few minutes
    python train.py --num-epochs 5 --total-pairs-per-epoch 16
    torchrun --nproc_per_node=8 train.py --reward-preset pickscore
"""

import sys

from fdfo.checkpoint import find_checkpoint, saved_config
from fdfo.command_line import flag_value, parse_train_config
from fdfo.distributed import exit_on_user_error, start_job
from fdfo.evaluation import compare_with_base
from fdfo.trainer import train


def main() -> None:
    argv = sys.argv[1:]
    with start_job() as job:
        resume_from = flag_value(argv, "--resume-from")
        checkpoint = job.on_main(lambda: find_checkpoint(resume_from)) if resume_from else None
        saved = saved_config(checkpoint) if checkpoint is not None and checkpoint.resumable else None
        config = parse_train_config(argv, saved, quiet=not job.is_main)
        assert (config.resume_from or "") == resume_from
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
