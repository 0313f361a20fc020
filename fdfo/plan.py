"""Numbers derived from a config: micro-batches, churn, and the settings of evaluation pictures."""

import math
from dataclasses import dataclass

from fdfo.config import PRESETS, ChurnConfig, GenerateConfig, MetricsConfig, TrainConfig, UserError

CHURN_DEFAULTS = {
    "raw": {"weight": 0.0025},
    "interval": {"weight": 1.0, "weight_sd": 0.0, "mu": 1.0, "sd": 1.5, "soft_sd": 0.25},
    "prior": {"weight": 0.1, "weight_sd": 1.0},
}


@dataclass(frozen=True)
class BatchPlan:
    """How the pairs and samples of an epoch are divided among processes and micro-batches."""

    pairs: tuple[int, ...]  # pairs of each rank
    samples: int  # (trajectory, step) samples of the epoch, all ranks together
    gradient_steps: int  # optimizer steps of the epoch
    sample_batch: int  # pairs a micro-batch when sampling
    train_batch: int  # samples a micro-batch when training

    def describe(self) -> str:
        largest, smallest = max(self.pairs), min(self.pairs)
        share = f"{largest}" if largest == smallest else f"{smallest} or {largest}"
        return (
            f"batch plan: {sum(self.pairs)} pairs an epoch on {len(self.pairs)} process(es), {share} each, sampled "
            f"{self.sample_batch} at a time; {self.samples} samples in {self.gradient_steps} optimizer step(s), "
            f"micro-batches of {self.train_batch}"
        )


def plan_batches(config: TrainConfig, world_size: int) -> BatchPlan:
    """Micro-batches no larger than --max-batch-size (METHOD.md 4).

    Those of training are of one even size, and with it as few as possible: sampling takes as many pairs at a time as fill
    whole batches of that size, the only one for which the transformer is compiled. Raises UserError where the batch sizes, pairs, optimizer steps and processes do not fit together.
    """
    pairs, steps = config.total_pairs_per_epoch, config.gradient_steps_per_epoch
    if pairs < world_size:
        raise UserError(f"{pairs} pairs an epoch cannot feed {world_size} processes: start {pairs} or fewer.")
    samples = 2 * pairs * config.sample.num_solver_steps
    if steps > samples:
        raise UserError(f"{steps} gradient steps an epoch are more than its {samples} samples: lower --gradient-steps-per-epoch.")
    largest = config.max_batch_size if config.max_batch_size is not None else (13 if world_size >= 8 else 6)
    if largest < 1:
        raise UserError(f"--max-batch-size is {largest}: give a whole number of 1 or more.")
    shares = tuple(pairs * (rank + 1) // world_size - pairs * rank // world_size for rank in range(world_size))
    for flag, value in (("sample", config.sample.batch_size), ("train", config.train.batch_size)):
        if value is not None and not 1 <= value <= largest:
            raise UserError(
                f"--{flag}.batch-size {value} is not between 1 and --max-batch-size {largest}: change one of the two."
            )
    share_of_step = -(-samples // (steps * world_size))
    train_batch = min(config.train.batch_size or even_batch(share_of_step, largest), share_of_step)
    filling = train_batch // math.gcd(2, train_batch)  # pairs that fill one batch of the transformer, or two
    sample_batch = min(config.sample.batch_size or largest // filling * filling, max(shares))
    return BatchPlan(shares, samples, steps, sample_batch, train_batch)


def even_batch(count: int, largest: int) -> int:
    """The size of micro-batches that divide count into as few and equal parts as possible, lowered to an even number above 1."""
    size = -(-count // -(-count // largest))
    return size - size % 2 if size > 1 else 1


def plan_churn(churn: ChurnConfig) -> dict[str, float]:
    """The numbers of the churn schedule, each left-out one at its schedule's default (METHOD.md 2)."""
    numbers = dict(CHURN_DEFAULTS[churn.schedule])
    for name in ("weight", "weight_sd", "mu", "sd", "soft_sd"):
        value = getattr(churn, name)
        if value is None:
            continue
        if name not in numbers:
            raise UserError(
                f"--churn.{name.replace('_', '-')} has no effect with --churn.schedule {churn.schedule}: leave it out."
            )
        if not math.isfinite(value) or (name != "mu" and value < 0) or (name in ("weight", "soft_sd") and value == 0):
            raise UserError(f"--churn.{name.replace('_', '-')} is {value}: give a positive number.")
        numbers[name] = value
    return numbers


@dataclass(frozen=True)
class PictureSettings:
    """How evaluation pictures are drawn."""

    width: int
    height: int
    steps: int
    guidance: float
    batch_size: int


@dataclass(frozen=True)
class PicturePlan:
    """What evaluation pictures come from: flags first, then the checkpoint's run, then the preset."""

    model: str
    half_precision: bool
    prompt_set: str
    pictures: PictureSettings


def plan_pictures(config: GenerateConfig | MetricsConfig, run: TrainConfig | None, guidance: float | None) -> PicturePlan:
    """The plan for generate.py and metrics.py: run is the config of the run that the checkpoint belongs to, guidance what it was
    trained with, where that is known."""
    base = run or PRESETS[config.preset]
    model = config.pretrained_model or base.pretrained_model

    def first(flag, default):
        return default if flag is None else flag

    settings = PictureSettings(
        first(config.width, base.sample.resolution),
        first(config.height, base.sample.resolution),
        first(config.num_inference_steps, base.sample.num_solver_steps),
        first(config.guidance_scale, first(guidance, base.sample.guidance_scale)),
        config.batch_size,
    )
    return PicturePlan(model, base.precision != "fp32", "tiny_heldout" if base.preset == "tiny" else "showcase", settings)
