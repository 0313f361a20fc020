"""How far the gradient of a subset of an epoch's samples is from that of all of them, by the number of steps and branches.

python benchmarks/subset_gradient.py --out tiny.json                                              # two CPU cores, or a GPU
python benchmarks/random_hub.py --parts sd35 clip --out /dev/shm/random_hub
export HF_HOME=/dev/shm/random_hub HF_HUB_OFFLINE=1
python benchmarks/subset_gradient.py --preset sd35-medium --pairs 4 --epochs 0 --out full.json    # one GPU

The gradient of each sample is computed by itself, at the weights that sampled; their inner products then give the error of any
subset. An error is the root of the mean square over many draws of |subset - all|, over |all|, for the gradient of the whole epoch. It
falls with the number of pairs, as the noise of the pairs themselves does: half of the pairs, drawn at random, against all.
"""

import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from fdfo.config.errors import UserError  # noqa: E402
from fdfo.config.options import to_dict  # noqa: E402
from fdfo.config.presets import PRESETS  # noqa: E402
from fdfo.config.train_options import TrainConfig  # noqa: E402
from fdfo.distributed.job import Job  # noqa: E402
from fdfo.distributed.launch import run_command_line, start_job  # noqa: E402
from fdfo.distributed.machine import versions  # noqa: E402
from fdfo.method.prepare import Run, prepare  # noqa: E402
from fdfo.method.rollout import PairShare, pair_samples, sample_share, score_share  # noqa: E402
from fdfo.method.trainer import train  # noqa: E402
from fdfo.method.update import EpochData, StepSamples, accumulate_gradient  # noqa: E402
from fdfo.run_folder.start import FRESH  # noqa: E402
from fdfo.storage.prompts import epoch_prompts  # noqa: E402

STEP_SAMPLES = 8640  # samples of an optimizer step of the default plan, which a sample's share of the loss is one of
SCALE = 2.0**24  # of the loss in float16


@dataclass(frozen=True)
class SubsetGradientConfig:
    """Compare gradients of subsets with that of all samples."""

    preset: Literal["tiny-published", "sd35-medium"] = "tiny-published"
    """train.py's preset; sd35-medium with PickScore as its reward"""
    pairs: int = 64
    """pairs of the epoch"""
    solver_steps: int | None = None
    """solver steps of a trajectory (the preset's)"""
    epochs: tuple[int, ...] = (0, 20)
    """epochs trained before, with all samples"""
    parts: tuple[int, ...] = (1, 2, 4, 5, 8, 10, 20, 40)
    """numbers of steps of a trajectory; those above the solver steps are left out"""
    draws: int = 200
    """draws of a subset"""
    out: Path | None = None
    """JSON file for the figures"""


def run_config(config: SubsetGradientConfig, folder: Path) -> TrainConfig:
    """Return the options that train.py would get."""
    preset = PRESETS[config.preset]
    steps = config.solver_steps or preset.sample.num_solver_steps
    changes = (
        {} if config.preset == "tiny-published" else dict(prompt_set="showcase", reward_preset="pickscore", max_batch_size=12)
    )
    return dataclasses.replace(
        preset, sample=dataclasses.replace(preset.sample, num_solver_steps=steps), eval_prompts=0, runs_dir=folder, compile=False,
        total_pairs_per_epoch=config.pairs, **changes,
    )  # fmt: skip


def trained(job: Job, settings: TrainConfig, epochs: int) -> Run:
    """Return a run after that many epochs."""
    run = prepare(job, settings, FRESH)
    if epochs == 0:
        return run
    run = train(
        job,
        dataclasses.replace(settings, total_pairs_per_epoch=PRESETS["tiny-published"].total_pairs_per_epoch, num_epochs=epochs),
    )
    run.log.close()
    return run


def next_epoch(run: Run, settings: TrainConfig) -> EpochData:
    """Sample and score the run's next epoch."""
    epoch = run.progress.epochs
    prompts = epoch_prompts(run.prompts, epoch, settings.total_pairs_per_epoch, settings.seed)
    text = run.model.encode_prompts(prompts, settings.sample.guidance_scale)
    rollout = sample_share(run.model, settings, run.plan, PairShare(epoch, range(len(prompts)), prompts, *text))
    differences = score_share(rollout, run.model.decode(rollout.final), run.judges.reward)
    return EpochData(run.model, settings, run.plan, rollout, differences)


def inner_products(data: EpochData) -> torch.Tensor:
    """Return the inner products of the samples' gradients, up to a factor: [S, S] float64 on the CPU. Raises UserError for an overflow."""
    parameters, scale = data.model.trainable(), SCALE if data.config.precision == "fp16" else 1.0
    count, size = len(data.rollout.xs), sum(p.numel() for p in parameters)
    gradients = torch.empty(count, size, device=data.model.device)
    for sample in range(count):
        for parameter in parameters:
            parameter.grad = None
        accumulate_gradient(data, StepSamples(torch.tensor([sample]), STEP_SAMPLES), scale, lambda done: False)
        torch.cat([p.grad.flatten() for p in parameters], out=gradients[sample])
    if not gradients.isfinite().all():
        raise UserError("A gradient overflowed: lower SCALE in this file.")
    gradients /= gradients.norm(dim=1).max()
    return (gradients @ gradients.T).double().cpu()


def error(products: torch.Tensor, weights: torch.Tensor) -> float:
    """Return the relative error of weighted sums of the gradients against their sum: weights [D, S] of D draws."""
    off = weights - 1
    squares = ((off @ products) * off).sum(1)
    return float((squares.mean() / products.sum()).sqrt())


def subset_weights(settings: TrainConfig, parts: int, branches: str, draws: int) -> torch.Tensor:
    """Return the weight of every sample in draws of a subset, 0 for those that are not in it: [D, S] float64."""
    T, P = settings.sample.num_solver_steps, settings.total_pairs_per_epoch
    chosen = dataclasses.replace(
        settings, train=dataclasses.replace(settings.train, steps_per_trajectory=parts, branches=branches)
    )
    weights = torch.zeros(draws, 2 * P * T, dtype=torch.float64)
    for draw in range(draws):
        samples = pair_samples(chosen, draw, range(P))
        factor = 2 * P * T / len(samples.step)  # a mean over the subset stands for the mean over all
        weights[draw, samples.trajectory * T + samples.step] = factor * samples.weight.double()
    return weights


def pair_weights(settings: TrainConfig, draws: int) -> torch.Tensor:
    """Return the weights of a random half of the pairs: [D, S] float64."""
    P, generator = settings.total_pairs_per_epoch, torch.Generator().manual_seed(0)
    order = torch.rand(draws, P, generator=generator).argsort(1)
    return ((order < P // 2).double() * P / (P // 2)).repeat_interleave(2 * settings.sample.num_solver_steps, dim=1)


def measure(config: SubsetGradientConfig, job: Job, epochs: int) -> dict:
    """Measure the errors after some epochs."""
    with tempfile.TemporaryDirectory() as folder:
        settings = run_config(config, Path(folder))
        products = inner_products(next_epoch(trained(job, settings, epochs), settings))
    result = {"half of the pairs": error(products, pair_weights(settings, config.draws))}
    T = settings.sample.num_solver_steps
    for parts in [parts for parts in config.parts if parts <= T]:
        for branches, share in (("both", parts / T), ("one", parts / T / 2)):
            found = error(products, subset_weights(settings, parts, branches, config.draws))
            result[f"{parts} steps, {branches}"] = {"share of the samples": share, "relative error": found}
    return result


def main(config: SubsetGradientConfig) -> None:
    if config.preset != "tiny-published" and config.epochs != (0,):
        raise UserError("--epochs has no effect with random weights: give --epochs 0.")
    with start_job() as job:
        device = torch.cuda.get_device_name() if job.device.type == "cuda" else "CPU"
        found = {f"after {epochs} epochs": measure(config, job, epochs) for epochs in config.epochs}
    result = {"device": device, "config": to_dict(config), "versions": versions()}
    print(json.dumps(result | found, indent=2))
    if config.out is not None:
        config.out.write_text(json.dumps(result | found, indent=2) + "\n")


if __name__ == "__main__":
    run_command_line(lambda: main(tyro.cli(SubsetGradientConfig)))
