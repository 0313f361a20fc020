"""Before the first epoch: does the largest micro-batch fit on the GPU beside all that a run holds."""

import dataclasses
import math

import torch

from fdfo.config import TrainConfig, UserError
from fdfo.distributed import Job
from fdfo.model import FlowModel
from fdfo.plan import BatchPlan, plan_batches
from fdfo.rollout import encode_prompts, trajectory_storage


def fitting_plan(job: Job, config: TrainConfig, model: FlowModel, plan: BatchPlan) -> BatchPlan:
    """The plan, or one of smaller micro-batches where a GPU of the job lacks the memory; says so. Raises UserError at 1.

    The numbers of a run do not depend on micro-batches but for rounding. On CPUs the plan stays as it is.
    """
    while job.device.type == "cuda" and job.max(int(not fits(job, config, model, plan))):
        largest = max(plan.sample_batch, plan.train_batch)
        if largest == 1:
            raise UserError(
                "The GPU has no memory for a micro-batch of 1: free it, lower --sample.resolution, or use a larger GPU."
            )
        smaller = plan_batches(with_largest(config, largest * 3 // 4), job.world_size)
        job.print(
            f"warning: micro-batches of {largest} do not fit on the GPU: going on as with --max-batch-size {largest * 3 // 4}"
        )
        job.print(smaller.describe())
        plan = smaller
        torch.cuda.reset_peak_memory_stats(job.device)  # that of a trial that failed says nothing
        if model.compiled_rows is not None:
            model.compiled_rows = plan.train_batch
    return plan


def expected_memory(job: Job, config: TrainConfig, model: FlowModel, plan: BatchPlan) -> str:
    """One line about the memory of a process: on a GPU what was measured up to the trial, and what an epoch's trajectories take."""
    held = trajectory_bytes(config, model, plan)
    if job.device.type == "cpu":
        return f"memory: {held / 2**20:,.1f} MiB a process for an epoch's trajectories, beside the models"
    total = torch.cuda.get_device_properties(job.device).total_memory / 2**30
    peak = job.max(torch.cuda.max_memory_allocated(job.device)) / 2**30
    where = "host" if trajectory_storage(config, job.device).type == "cpu" else "GPU"
    return (
        f"memory: at most {peak:.1f} of the GPU's {total:.1f} GiB so far, a trial of the largest micro-batches included, decoding and "
        f"scoring not; {held / 2**30:.1f} GiB of {where} memory for an epoch's trajectories"
    )


def trajectory_bytes(config: TrainConfig, model: FlowModel, plan: BatchPlan) -> int:
    """Bytes of the latents and velocities that the process with the largest share keeps in an epoch."""
    numbers = config.sample.num_solver_steps * math.prod(model.latent_shape(config.sample.resolution))
    return 2 * 2 * max(plan.pairs) * numbers * model.compute_type.itemsize


def with_largest(config: TrainConfig, largest: int) -> TrainConfig:
    """The config with --max-batch-size as given, and no micro-batch above it."""

    def cut(size: int | None) -> int | None:
        return None if size is None else min(size, largest)

    sample = dataclasses.replace(config.sample, batch_size=cut(config.sample.batch_size))
    update = dataclasses.replace(config.train, batch_size=cut(config.train.batch_size))
    return dataclasses.replace(config, sample=sample, train=update, max_batch_size=largest)


def fits(job: Job, config: TrainConfig, model: FlowModel, plan: BatchPlan) -> bool:
    """Whether this rank can sample, and go forward and backward, with a micro-batch beside its share of trajectories."""
    shape, rows = model.latent_shape(config.sample.resolution), 2 * plan.pairs[job.rank]
    try:
        storage = trajectory_storage(config, job.device)
        held = torch.empty(2, rows, config.sample.num_solver_steps, *shape, device=storage, dtype=model.compute_type)
        text, empty = encode_prompts(model, [""], config)
        for size, gradient in ((2 * plan.sample_batch, False), (plan.train_batch, True)):
            x, levels = torch.zeros(size, *shape, device=job.device), torch.full((size,), 0.5, device=job.device)
            with torch.set_grad_enabled(gradient):
                v = model.velocity(x, levels, text.rows([0] * size), empty, config.sample.guidance_scale)
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
