"""Run under torchrun by test_vlm.py: scores unequal numbers of images with a sharded and an unsharded judge."""

import sys

import torch

from fdfo.distributed.launch import run_command_line, start_job
from fdfo.storage.prompts import Prompt
from rewards.vlm.judge import QUESTIONS, Vlm, VlmScorer
from rewards.vlm.pair import VlmPairJudge
from rewards.vlm.questions import VlmQuestions


def main() -> None:
    with start_job() as job:
        count = 2 if job.is_main else 20  # of two lengths here, of three there, so in more batches
        captions = [f"caption {i}" + " and more" * (20 * (i % 3)) for i in range(count)]
        images = torch.rand(count, 3, 56, 56, generator=torch.Generator().manual_seed(job.rank))
        judges = [Vlm(sys.argv[1], job, shard) for shard in (False, True)]
        assert [judge.sharded for judge in judges] == [False, True]
        whole, own = (sum(p.to_local().numel() if j.sharded else p.numel() for p in j.model.parameters()) for j in judges)
        assert own < 0.6 * whole, (own, whole)
        scores = [VlmScorer(judge, QUESTIONS["vlm_alignment_train"], "training").score(captions, images) for judge in judges]
        pairs = len(captions) // 2
        scores += [VlmPairJudge(judge).compare(captions[:pairs], images[:pairs], images[pairs:]) for judge in judges]
        asked = [Prompt(caption, [f"Is it {caption}?", "Is it red?"][: 1 + i % 2]) for i, caption in enumerate(captions)]
        scores += [VlmQuestions(judge, "training").score(asked, images) for judge in judges]
        results = job.gather_objects([values.tolist() for values in scores])
        if job.is_main:
            torch.save(results, sys.argv[2])


if __name__ == "__main__":
    run_command_line(main)
