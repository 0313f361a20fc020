"""Evaluates a run on its held-out prompts where it is due. It draws them with the method's flow without churn, through the training graph.

The stock pipeline, which draws for generate.py and metrics.py (fdfo/model/images.py), would need its own memory and compiled
blocks.
"""

from collections.abc import Callable

import torch

from fdfo.config.errors import UserError
from fdfo.config.plan import BatchPlan
from fdfo.config.train_options import TrainConfig
from fdfo.distributed.stages import Stages
from fdfo.evaluation.health import check_images_left
from fdfo.evaluation.heldout import HeldOut, score_held_out
from fdfo.evaluation.record import newest_evaluation, record
from fdfo.method.prepare import Run
from fdfo.method.sampling import sample_flow
from fdfo.model.flow_model import FlowModel
from fdfo.model.images import finite_rows, quantised
from fdfo.report.console import print_evaluation
from fdfo.run_folder.log import evaluation_due
from fdfo.run_folder.save_checkpoint import prune_checkpoints

EVALUATION_SEED, REPEAT_SEEDS = 100_000, 1_000_000  # seed of the first image; distance to those of the next repeat


@torch.no_grad()
def draw_held_out(
    model: FlowModel, config: TrainConfig, plan: BatchPlan, held_out: HeldOut, before_batch: Callable[[int], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw this rank's images, a prompt's together: [N, 3, H, W] uint8 on the CPU, and which of them are finite: [N] bool.

    They are sampled with the micro-batches, text length and compiled blocks of training. The noise of an image depends on its
    prompt's number and its repeat alone.
    """
    sigmas = model.sigmas(config.sample.num_solver_steps, config.sample.resolution)
    shape = model.latent_shape(config.sample.resolution)
    places = [(row, repeat) for row in range(len(held_out.own)) for repeat in range(held_out.repeats)]
    empty, images, finite = None if held_out.empty is None else held_out.empty.to(model.device), [], []
    with model.together():
        for start in range(0, len(places), 2 * plan.sample_batch):
            before_batch(start)
            batch = places[start : start + 2 * plan.sample_batch]
            text = held_out.text.rows([row for row, _ in batch]).to(model.device)
            noise = torch.stack([image_noise(shape, held_out.own[row], repeat) for row, repeat in batch]).to(model.device)
            velocity = model.velocity_at(text, empty, config.sample.guidance_scale)
            decoded = model.decode(sample_flow(velocity, noise, sigmas))  # [n, 3, H, W]
            images.append(quantised(decoded))
            finite.append(finite_rows(decoded).cpu())
    return torch.cat(images), torch.cat(finite)


def image_noise(shape: tuple[int, ...], prompt: int, repeat: int) -> torch.Tensor:
    """Return the starting noise of an image, float32 on the CPU, from its prompt's number and its repeat."""
    seed = EVALUATION_SEED + REPEAT_SEEDS * repeat + prompt
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def evaluated_after(run: Run, epochs: int) -> bool:
    """Return whether the run evaluates after that many epochs."""
    return run.held_out is not None and evaluation_due(run.config, epochs)


def evaluate(run: Run, stages: Stages) -> None:
    """Evaluate on the held-out prompts if it is due, unless the log has the evaluation already."""
    progress, held_out, job = run.progress, run.held_out, run.job
    epoch = progress.epochs
    if progress.steps or not evaluated_after(run, epoch):
        return
    if job.on_main(lambda: any(line["epoch"] == epoch for line in run.log.evaluations)):
        return
    with stages("evaluate", epoch, total=len(held_out.own) * held_out.repeats, unit="images"):
        images, finite = draw_held_out(run.model, run.config, run.plan, held_out, stages.progress)
    with stages("evaluate", epoch):
        evaluation = score_held_out(job, epoch, held_out, images, finite)
    check_images_left(job, epoch, finite)
    job.on_main(lambda: prune(run))
    seconds = stages.clock.take("evaluate")
    job.on_main(lambda: record(run.log, held_out, evaluation, images[:: held_out.repeats], seconds))
    line = job.on_main(lambda: newest_evaluation(run.log))
    if run.people is not None:
        shown = images[:: held_out.repeats]
        job.on_main(lambda: run.people.tell_evaluation(epoch, line["means"], held_out.prompts, shown))
    if job.is_main:
        print_evaluation(line)
    if run.config.strict and line["warnings"]:
        raise strict_stop(run, line["warnings"])


def strict_stop(run: Run, warnings: list[str]) -> UserError:
    """Return the error that --strict ends with."""
    return UserError(
        f"--strict stops after epoch {run.progress.epochs}, with a checkpoint: {'; '.join(warnings)}. Fix that, or resume "
        f"{run.folder} with --no-strict."
    )


def prune(run: Run) -> None:
    """Delete the checkpoints that are no longer wanted. Called once images were drawn with the newest one."""
    prune_checkpoints(run.folder, run.config.keep_last, run.config.keep_every)
