"""Plans: numbers derived from options, such as micro-batches, churn and the settings of images."""

import math
from dataclasses import dataclass

from fdfo.config.errors import UserError
from fdfo.config.options import flag_of
from fdfo.config.presets import PRESETS
from fdfo.config.tool_options import GenerateConfig, MetricsConfig
from fdfo.config.train_options import ChurnConfig, TrainConfig

CHURN_DEFAULTS = {
    "raw": {"weight": 0.0025},
    "interval": {"weight": 1.0, "weight_sd": 0.0, "mu": 1.0, "sd": 1.5, "soft_sd": 0.25},
    "prior": {"weight": 0.1, "weight_sd": 1.0},
}
PUBLISHED_PROCESSES = 8  # on which the published figures were made (docs/method.md 5)

LEAST_CHURN = 1e-14  # below, float32 rounds away the noise that parts the branches: its amount is about sqrt(2 gamma)


@dataclass(frozen=True)
class SubsetPlan:
    """Which (trajectory, step) samples of a pair are trained on (docs/method.md 4)."""

    steps: int  # parts of the grid, with one step of each
    branches: int  # at each of these steps
    whole: bool  # no subset was asked for: every sample, dealt to the optimizer steps as published

    @property
    def pair_samples(self) -> int:
        return self.steps * self.branches


@dataclass(frozen=True)
class BatchPlan:
    """How the pairs and samples of an epoch are divided among processes and micro-batches."""

    pairs: tuple[int, ...]  # pairs of each rank
    subset: SubsetPlan
    samples: int  # (trajectory, step) samples to train on in the epoch, all ranks together
    gradient_steps: int  # optimizer steps of the epoch
    sample_batch: int  # pairs a micro-batch when sampling
    train_batch: int  # samples a micro-batch when training

    def describe(self) -> str:
        largest, smallest = max(self.pairs), min(self.pairs)
        share = f"{largest}" if largest == smallest else f"{smallest} or {largest}"
        drawn = "" if self.subset.whole else f" ({self.subset.steps} steps of {self.subset.branches} branch(es) of each pair)"
        return (
            f"batch plan: {sum(self.pairs)} pairs per epoch on {len(self.pairs)} process(es), {share} each, sampled "
            f"{self.sample_batch} at a time; {self.samples} samples{drawn} in {self.gradient_steps} optimizer step(s), "
            f"micro-batches of {self.train_batch}"
        )


def plan_batches(config: TrainConfig, world_size: int) -> BatchPlan:
    """Plan micro-batches no larger than --max-batch-size (docs/method.md 4).

    In training all have one even size, and are as few as possible. Sampling takes as many pairs at a time as fill whole batches
    of that size, the only one for which the transformer is compiled. Raises UserError if the batch sizes, pairs, optimizer steps
    and processes do not fit together.
    """
    pairs, steps = config.total_pairs_per_epoch, config.gradient_steps_per_epoch
    if pairs < world_size:
        raise UserError(f"{pairs} pairs per epoch cannot feed {world_size} processes: start {pairs} or fewer.")
    subset = plan_subset(config)
    samples = pairs * subset.pair_samples
    if steps > samples:
        raise UserError(
            f"{steps} gradient steps per epoch are more than its {samples} samples: lower --gradient-steps-per-epoch."
        )
    largest = config.max_batch_size if config.max_batch_size is not None else (13 if world_size >= 8 else 6)
    shares = tuple(pairs * (rank + 1) // world_size - pairs * rank // world_size for rank in range(world_size))
    for flag, value in (("sample", config.sample.batch_size), ("train", config.train.batch_size)):
        if value is not None and value > largest:
            raise UserError(f"--{flag}.batch-size {value} is above --max-batch-size {largest}: change one of the two.")
    share_of_step = -(-samples // (steps * world_size))
    train_batch = min(config.train.batch_size or even_batch(share_of_step, largest), share_of_step)
    filling = train_batch // math.gcd(2, train_batch)  # pairs that fill one batch of the transformer, or two
    sample_batch = min(config.sample.batch_size or largest // filling * filling, max(shares))
    return BatchPlan(shares, subset, samples, steps, sample_batch, train_batch)


def plan_subset(config: TrainConfig) -> SubsetPlan:
    """Plan which samples of a pair are trained on. Raises UserError for more steps than there are, and for branches that never part."""
    T, steps, branches = config.sample.num_solver_steps, config.train.steps_per_trajectory, config.train.branches
    if steps is not None and steps > T:
        raise UserError(
            f"--train.steps-per-trajectory {steps} is more than the {T} steps of a trajectory: give {T} or less, or raise "
            "--sample.num-solver-steps."
        )
    weight = plan_churn(config.churn)["weight"]
    if branches == "one" and weight < LEAST_CHURN:
        raise UserError(
            f"--train.branches one needs branches that part, which --churn.weight {weight:g} is too small for: give more, as the "
            f"default of --churn.schedule {config.churn.schedule}."
        )
    return SubsetPlan(steps or T, 2 if branches == "both" else 1, steps is None and branches == "both")


def even_batch(count: int, largest: int) -> int:
    """Return the size of micro-batches that divide count into as few and equal parts as possible: even, unless the largest is 1."""
    size = -(-count // -(-count // largest))
    even = size + size % 2  # lowering it would need a batch more, which matters where there are few
    return even if even <= largest else max(size - 1, 1)


def plan_churn(churn: ChurnConfig) -> dict[str, float]:
    """Return the numbers of the churn schedule, with its defaults for those left out (docs/method.md 2). Raises UserError."""
    numbers = dict(CHURN_DEFAULTS[churn.schedule])
    for name in ("weight", "weight_sd", "mu", "sd", "soft_sd"):
        value = getattr(churn, name)
        if value is None:
            continue
        if name not in numbers:
            raise UserError(f"{flag_of(f'churn.{name}')} has no effect with --churn.schedule {churn.schedule}: leave it out.")
        numbers[name] = value
    return numbers


@dataclass(frozen=True)
class ImageSettings:
    """How images are drawn without churn."""

    width: int
    height: int
    steps: int
    guidance: float
    batch_size: int
    published_processes: int | None = None  # seeds and rounding of the published code on that many processes; None: this code's

    def describe(self) -> str:
        way = "" if self.published_processes is None else f", as published on {self.published_processes} process(es)"
        return f"{self.width} x {self.height}, {self.steps} steps, guidance {self.guidance}{way}"


@dataclass(frozen=True)
class ImagePlan:
    """Which model draws the images of generate.py and metrics.py, and how."""

    model: str
    half_precision: bool
    prompt_set: str
    settings: ImageSettings


def published_processes(config: GenerateConfig | MetricsConfig) -> int | None:
    """Return the number of processes whose published way of drawing is asked for; None for this code's own way."""
    if not isinstance(config, MetricsConfig) or not config.as_published:
        return None
    return config.published_processes or PUBLISHED_PROCESSES


def plan_images(config: GenerateConfig | MetricsConfig, run: TrainConfig | None, guidance: float | None) -> ImagePlan:
    """Plan images: flags come first, then the checkpoint's run, then the preset.

    run: the config of the checkpoint's run; guidance: the one it was trained with. Each is None if unknown.
    """
    base = run or PRESETS[config.preset]

    def first(*values: float | None) -> float:
        return next(value for value in values if value is not None)

    settings = ImageSettings(
        first(config.width, base.sample.resolution),
        first(config.height, base.sample.resolution),
        first(config.num_inference_steps, base.sample.num_solver_steps),
        first(config.guidance_scale, guidance, base.sample.guidance_scale),
        config.batch_size,
        published_processes(config),
    )
    prompt_set = "tiny_heldout" if base.preset in ("tiny", "tiny-published") else "showcase"
    return ImagePlan(config.pretrained_model or base.pretrained_model, base.precision != "fp32", prompt_set, settings)
