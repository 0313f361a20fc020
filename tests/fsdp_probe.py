"""Run under torchrun by test_vlm.py: scores unequal numbers of pictures with a sharded and an unsharded judge."""

import sys

import torch

from fdfo.distributed import start_job
from rewards.vlm import TRAINING_QUESTION, VlmScorer

with start_job() as job:
    count = 2 if job.is_main else 20  # one batch here, two there
    captions = [f"caption {i}" for i in range(count)]
    images = torch.rand(count, 3, 56, 56, generator=torch.Generator().manual_seed(job.rank))
    scores = [VlmScorer(sys.argv[1], TRAINING_QUESTION, job, shard=shard).score(captions, images) for shard in (False, True)]
    results = job.gather_objects([values.tolist() for values in scores])
    if job.is_main:
        torch.save(results, sys.argv[2])
