"""Draws the held-out images during training: the method's flow without churn, through the training graph.

The stock pipeline, which draws for generate.py and metrics.py (fdfo/model/images.py), would need its own memory and compiled
blocks.
"""

from collections.abc import Callable

import torch

from fdfo.config.plan import BatchPlan
from fdfo.config.train_options import TrainConfig
from fdfo.evaluation.heldout import HeldOut
from fdfo.method.sampling import sample_flow
from fdfo.model.flow_model import FlowModel
from fdfo.model.images import finite_rows, quantised

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
