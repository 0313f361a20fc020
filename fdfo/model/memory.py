"""Checks, before the first epoch, whether the largest micro-batch fits on the GPU beside all that a run holds."""

import dataclasses
import math

import torch

from fdfo.config.errors import UserError
from fdfo.config.plan import BatchPlan, plan_batches
from fdfo.config.train_options import TrainConfig
from fdfo.distributed.job import Job
from fdfo.model.flow_model import FlowModel


def trajectory_storage(config: TrainConfig, device: torch.device) -> torch.device:
    """Return the device that keeps the trajectories.

    In host memory they are not pinned: pinned blocks are rounded up to powers of two, and only micro-batches are copied.
    """
    return torch.device("cpu") if config.offload_trajectories else device


def fitting_plan(job: Job, config: TrainConfig, model: FlowModel, plan: BatchPlan) -> BatchPlan:
    """Return the plan, or one with smaller micro-batches if a GPU of the job lacks the memory. Raises UserError at size 1.

    The results of a run do not depend on micro-batches but for rounding. On CPUs the plan stays as it is.
    """
    while job.device.type == "cuda" and job.max(int(not fits(job, config, model, plan))):
        largest = max(plan.sample_batch, plan.train_batch)
        if largest == 1:
            raise UserError(
                "The GPU has no memory for a micro-batch of 1: free it, lower --sample.resolution, or use a larger GPU."
            )
        plan = plan_batches(with_largest(config, largest * 3 // 4), job.world_size)
        job.print(
            f"warning: micro-batches of {largest} do not fit on the GPU: continuing with --max-batch-size {largest * 3 // 4}"
        )
        job.print(plan.describe())
        torch.cuda.reset_peak_memory_stats(job.device)  # that of a failed trial says nothing
        if model.compiled_rows is not None:
            model.compiled_rows = plan.train_batch
    return plan


def expected_memory(job: Job, config: TrainConfig, model: FlowModel, plan: BatchPlan) -> str:
    """Return one line about a process's memory: the measured peak up to the trial, and what an epoch's trajectories take."""
    held = trajectory_bytes(config, model, plan)
    if job.device.type == "cpu":
        return f"memory: {held / 2**20:,.1f} MiB per process for an epoch's trajectories, beside the models"
    total = torch.cuda.get_device_properties(job.device).total_memory / 2**30
    peak = job.max(torch.cuda.max_memory_allocated(job.device)) / 2**30
    where = "host" if trajectory_storage(config, job.device).type == "cpu" else "GPU"
    return (
        f"memory: at most {peak:.1f} of the GPU's {total:.1f} GiB so far, including a trial of the largest micro-batches, without "
        f"decoding and scoring; {held / 2**30:.1f} GiB of {where} memory for an epoch's trajectories"
    )


def trajectory_bytes(config: TrainConfig, model: FlowModel, plan: BatchPlan) -> int:
    """Return the bytes of the latents and velocities that the process with the largest share keeps in an epoch."""
    numbers = math.prod(model.latent_shape(config.sample.resolution))
    return 2 * max(plan.pairs) * plan.subset.pair_samples * numbers * model.compute_type.itemsize


def with_largest(config: TrainConfig, largest: int) -> TrainConfig:
    """Return the config with this --max-batch-size, and no micro-batch above it."""

    def cut(size: int | None) -> int | None:
        return None if size is None else min(size, largest)

    sample = dataclasses.replace(config.sample, batch_size=cut(config.sample.batch_size))
    update = dataclasses.replace(config.train, batch_size=cut(config.train.batch_size))
    return dataclasses.replace(config, sample=sample, train=update, max_batch_size=largest)


def fits(job: Job, config: TrainConfig, model: FlowModel, plan: BatchPlan) -> bool:
    """Try to sample, and to go forward and backward, with a micro-batch beside this rank's share of trajectories."""
    shape, kept = model.latent_shape(config.sample.resolution), plan.pairs[job.rank] * plan.subset.pair_samples
    guidance = config.sample.guidance_scale
    try:
        storage = trajectory_storage(config, job.device)
        held = torch.empty(2, kept, *shape, device=storage, dtype=model.compute_type)
        text, empty = model.encode_prompts([""], guidance)
        text = model.long_text(text)
        for size, gradient in ((2 * plan.sample_batch, False), (plan.train_batch, True)):
            x = torch.zeros(size, *shape, device=job.device)  # [size, C, H, W]
            with model.together(), torch.set_grad_enabled(gradient):
                v = model.velocity_at(text.rows([0] * size), empty, guidance)(x, 0.5)
                if gradient:
                    v.float().square().mean().backward()
        del held
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        for parameter in model.trainable():
            parameter.grad = None
        torch.cuda.empty_cache()
