"""Command lines as frozen dataclasses, their presets, and the numbers derived from them (BatchPlan, ChurnPlan)."""

import dataclasses
import json
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"


class UserError(ValueError):
    """A mistake that the user can mend. Its text is one sentence that says what to do; command lines exit with code 2."""


@dataclass(frozen=True)
class SampleConfig:
    num_solver_steps: int = 40
    """solver steps T of a trajectory"""
    guidance_scale: float = 1.0
    """classifier-free guidance in sampling and training; 1 means none"""
    resolution: int = 512
    """width and height of the pictures, pixels"""
    batch_size: int | None = None
    """pairs a micro-batch when sampling; chosen from --max-batch-size if left out"""


@dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = 3e-5
    """AdamW learning rate"""
    clip_range: float = 0.03
    """eps of the surrogate loss: how far the ratio may move from 1"""
    adam_beta1: float = 0.9
    """AdamW beta1"""
    adam_beta2: float = 0.999
    """AdamW beta2"""
    adam_weight_decay: float = 1e-4
    """AdamW weight decay"""
    adam_epsilon: float = 1e-8
    """AdamW epsilon"""
    max_grad_norm: float = 1.0
    """norm to which the gradient of an optimizer step is clipped"""
    kl_weight: float = 0.0
    """weight of the squared distance to the base model's velocity; 0 means none"""
    batch_size: int | None = None
    """samples a micro-batch when training; chosen from --max-batch-size if left out"""


@dataclass(frozen=True)
class ChurnConfig:
    schedule: Literal["raw", "interval", "prior"] = "raw"
    """where the branches of a pair part: everywhere, around one noise level, or in the starting noise"""
    weight: float | None = None
    """amount of churn (raw 0.0025, interval 1.0, prior 0.1)"""
    weight_sd: float | None = None
    """spread of the log of the amount from pair to pair (interval 0.0, prior 1.0)"""
    mu: float | None = None
    """mean of the interval's centre, logit of the noise level (interval 1.0)"""
    sd: float | None = None
    """spread of the interval's centre from pair to pair (interval 1.5)"""
    soft_sd: float | None = None
    """width of the interval (interval 0.25)"""


CHURN_DEFAULTS = {
    "raw": {"weight": 0.0025},
    "interval": {"weight": 1.0, "weight_sd": 0.0, "mu": 1.0, "sd": 1.5, "soft_sd": 0.25},
    "prior": {"weight": 0.1, "weight_sd": 1.0},
}


@dataclass(frozen=True)
class TrainConfig:
    """Train a LoRA of a text-to-image flow model with a reward, by Finite Difference Flow Optimization."""

    preset: Literal["sd35-medium", "tiny"] = "sd35-medium"
    """set of defaults; tiny trains a small bundled model with no download and no GPU"""
    sample: SampleConfig = SampleConfig()
    train: OptimConfig = OptimConfig()
    churn: ChurnConfig = ChurnConfig()
    run_name: str | None = None
    """name of the run folder after its number; by default the reward preset and the guidance"""
    runs_dir: Path = Path("runs")
    """folder that holds the run folders"""
    seed: int = 6
    """seed of the prompts' order, the noise, the adapter's start and the order of samples"""
    num_epochs: int = 1000
    """epochs of the whole run, those before a resume included"""
    save_freq: int = 5
    """epochs between checkpoints; the last epoch is always saved"""
    resume_from: str | None = None
    """checkpoint folder, run folder (its latest checkpoint) or hub URL to go on from"""
    lora_rank: int = 32
    """rank of the LoRA"""
    lora_alpha: int = 64
    """alpha of the LoRA; its output is scaled by alpha / rank"""
    vlm_model_name: str = "qwenvl-7b"
    """judge of the vlm rewards: qwenvl-7b, qwenvl-3b, qwenvl-72b, a hub id or a folder"""
    vlm_use_fsdp: bool = True
    """shard the judge over the GPUs of the job"""
    memory_efficient: bool = True
    """text encoders leave the GPU while nothing is encoded"""
    pretrained_model: str = SD35_MEDIUM
    """hub id or folder of the StableDiffusion3Pipeline to train, or tiny for the bundled one"""
    prompt_set: str = "pickscore_train"
    """name in prompt_sets/ or a text file, one prompt a line"""
    total_pairs_per_epoch: int = 432
    """pairs sampled in an epoch by all processes together"""
    gradient_steps_per_epoch: int = 4
    """optimizer steps an epoch"""
    max_batch_size: int | None = None
    """largest micro-batch, pairs in sampling and samples in training (6, or 13 with 8 or more processes)"""
    reward_preset: str = "combined"
    """weighted set of scorers: pickscore, vlm_alignment, combined, or scene (for the tiny preset)"""
    reward_specs: tuple[str, ...] = ()
    """scorers and weights of your own instead of a preset: NAME=WEIGHT or MODULE:CLASS=WEIGHT"""
    log_wandb: bool = False
    """log to Weights & Biases too"""
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """type in which the transformer and the decoder compute"""
    heldout_prompt_set: str | None = None
    """prompts on which the base model and the trained adapter are compared at the end; none if left out"""
    heldout_prompts: int = 256
    """number of held-out prompts to compare on"""
    heldout_metrics: tuple[str, ...] = ()
    """scorers of that comparison"""


PRESETS = {
    "sd35-medium": TrainConfig(),
    "tiny": TrainConfig(
        preset="tiny",
        sample=SampleConfig(num_solver_steps=8, resolution=64),
        train=OptimConfig(learning_rate=2e-4, clip_range=0.2),
        churn=ChurnConfig(weight=0.02),
        num_epochs=20,
        memory_efficient=False,
        pretrained_model="tiny",
        prompt_set="tiny",
        total_pairs_per_epoch=128,
        max_batch_size=256,
        reward_preset="scene",
        precision="fp32",
        heldout_prompt_set="tiny_heldout",
        heldout_metrics=("scene", "scene_clip"),
    ),
}


def parse_train_config(argv: Sequence[str], saved: TrainConfig | None = None, quiet: bool = False) -> TrainConfig:
    """The command line of train.py over the defaults of --preset, or over those of the run that is resumed."""
    default = saved or PRESETS.get(flag_value(argv, "--preset"), PRESETS["sd35-medium"])
    config = tyro.cli(TrainConfig, args=list(argv), default=default, console_outputs=not quiet)
    check_train_config(config)
    return config


def flag_value(argv: Sequence[str], flag: str) -> str:
    """The value of a flag on a command line, written as two words or with an equals sign; empty if it is not there."""
    for i, word in enumerate(argv):
        if word == flag:
            return "".join(argv[i + 1 : i + 2])
        if word.startswith(flag + "="):
            return word.removeprefix(flag + "=")
    return ""


def check_train_config(config: TrainConfig) -> None:
    """Raises UserError for numbers that no run can have."""
    at_least_one = {
        "--sample.num-solver-steps": config.sample.num_solver_steps,
        "--sample.resolution": config.sample.resolution,
        "--num-epochs": config.num_epochs,
        "--save-freq": config.save_freq,
        "--lora-rank": config.lora_rank,
        "--lora-alpha": config.lora_alpha,
        "--total-pairs-per-epoch": config.total_pairs_per_epoch,
        "--gradient-steps-per-epoch": config.gradient_steps_per_epoch,
        "--heldout-prompts": config.heldout_prompts,
    }
    for flag, value in at_least_one.items():
        if value < 1:
            raise UserError(f"{flag} is {value}: give a whole number of 1 or more.")
    positive = {"learning-rate": config.train.learning_rate, "clip-range": config.train.clip_range}
    positive |= {"adam-epsilon": config.train.adam_epsilon, "max-grad-norm": config.train.max_grad_norm}
    for flag, value in positive.items():
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"--train.{flag} is {value}: give a number above 0.")
    if config.seed < 0:
        raise UserError(f"--seed is {config.seed}: give a whole number of 0 or more.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config.train, name) < 1:
            raise UserError(f"--train.{name.replace('_', '-')} must lie in [0, 1).")
    for name in ("adam_weight_decay", "kl_weight"):
        if not getattr(config.train, name) >= 0:
            raise UserError(f"--train.{name.replace('_', '-')} must be 0 or more.")
    if not config.sample.guidance_scale >= 0:
        raise UserError("--sample.guidance-scale must be 0 or more; 1 means no guidance.")
    plan_churn(config.churn)


@dataclass(frozen=True)
class GenerateConfig:
    """Draw a grid of pictures with a checkpoint, or with the base model."""

    out: Path
    """picture file to write (.jpg or .png)"""
    checkpoint: str | None = None
    """checkpoint folder, run folder, hub URL or hf:OWNER/NAME/FOLDER; the base model if left out"""
    preset: Literal["sd35-medium", "tiny"] = "sd35-medium"
    """base model and picture settings where neither the checkpoint's run nor a flag gives them"""
    pretrained_model: str | None = None
    """hub id or folder of the base model, or tiny"""
    prompts: tuple[str, ...] = ()
    """prompts of your own"""
    prompt_file: str | None = None
    """text file with one prompt a line, or a name in prompt_sets/; showcase if left out"""
    columns: int = 3
    """prompts side by side"""
    grid_cols: int = 3
    """pictures of a prompt side by side"""
    grid_rows: int = 1
    """rows of pictures of a prompt"""
    seed: int = 0
    """seed of the first picture; each further one adds 1"""
    width: int | None = None
    """width of a picture, pixels (512)"""
    height: int | None = None
    """height of a picture, pixels (512)"""
    num_inference_steps: int | None = None
    """solver steps (40)"""
    guidance_scale: float | None = None
    """classifier-free guidance (1.0, or what the checkpoint was trained with)"""
    batch_size: int = 4
    """pictures drawn at a time"""


def parse_generate_config(argv: Sequence[str]) -> GenerateConfig:
    config = tyro.cli(GenerateConfig, args=list(argv))
    if config.out.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise UserError(f"--out {config.out} is no picture file: end it with .jpg or .png.")
    if config.prompts and config.prompt_file:
        raise UserError("--prompts and --prompt-file exclude each other: leave one out.")
    if min(config.columns, config.grid_cols, config.grid_rows, config.batch_size) < 1 or config.seed < 0:
        raise UserError("--columns, --grid-cols, --grid-rows and --batch-size must be 1 or more, --seed 0 or more.")
    return config


@dataclass(frozen=True)
class MetricsConfig:
    """Score the pictures that a checkpoint, or the base model, draws for a prompt set."""

    metrics: tuple[str, ...]
    """scorers: pickscore, hpsv2, clip_h14, clip_l14, vlm_alignment, vlm_quality, vlm_photo, scene, scene_clip"""
    checkpoint: str | None = None
    """checkpoint folder, run folder, hub URL or hf:OWNER/NAME/FOLDER; the base model if left out"""
    preset: Literal["sd35-medium", "tiny"] = "sd35-medium"
    """base model and picture settings where neither the checkpoint's run nor a flag gives them"""
    pretrained_model: str | None = None
    """hub id or folder of the base model, or tiny"""
    prompt_set: str = "pickscore_train"
    """name in prompt_sets/ or a text file, one prompt a line"""
    num_prompts: int = 500
    """prompts to draw, the first of the shuffled set"""
    num_repeats: int = 1
    """pictures a prompt"""
    out: Path | None = None
    """JSON file for the results"""
    prompt_seed: int = 0
    """seed of the prompts' order"""
    image_seed: int = 0
    """seed of the first picture; each further one adds 1"""
    width: int | None = None
    """width of a picture, pixels (512)"""
    height: int | None = None
    """height of a picture, pixels (512)"""
    num_inference_steps: int | None = None
    """solver steps (40)"""
    guidance_scale: float | None = None
    """classifier-free guidance (1.0, or what the checkpoint was trained with)"""
    batch_size: int = 4
    """pictures drawn at a time"""
    vlm_model: str = "qwenvl-7b"
    """judge of the vlm metrics: qwenvl-7b, qwenvl-3b, qwenvl-72b, a hub id or a folder"""


def parse_metrics_config(argv: Sequence[str], quiet: bool = False) -> MetricsConfig:
    config = tyro.cli(MetricsConfig, args=list(argv), console_outputs=not quiet)
    if not config.metrics:
        raise UserError("--metrics names no scorer: give one or more, such as --metrics pickscore.")
    if min(config.num_prompts, config.num_repeats, config.batch_size) < 1 or min(config.prompt_seed, config.image_seed) < 0:
        raise UserError("--num-prompts, --num-repeats and --batch-size must be 1 or more, the seeds 0 or more.")
    return config


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


def plan_pictures(config: GenerateConfig | MetricsConfig, run: TrainConfig | None) -> PicturePlan:
    """The plan for generate.py and metrics.py; run is the config of the run that the checkpoint belongs to."""
    base = run or PRESETS[config.preset]
    model = config.pretrained_model or base.pretrained_model

    def first(flag, default):
        return default if flag is None else flag

    settings = PictureSettings(
        first(config.width, base.sample.resolution),
        first(config.height, base.sample.resolution),
        first(config.num_inference_steps, base.sample.num_solver_steps),
        first(config.guidance_scale, base.sample.guidance_scale),
        config.batch_size,
    )
    return PicturePlan(model, base.precision != "fp32", "tiny_heldout" if base.preset == "tiny" else "showcase", settings)


# ---------------------------------------------------------------------------------------------------------------------
# Derived numbers


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
    """Micro-batches no larger than --max-batch-size, as few and as even as possible (METHOD.md 4).

    Raises UserError where the batch sizes, pairs, optimizer steps and processes do not fit together.
    """
    pairs, steps = config.total_pairs_per_epoch, config.gradient_steps_per_epoch
    if pairs < world_size:
        raise UserError(f"{pairs} pairs an epoch cannot feed {world_size} processes: start {pairs} or fewer.")
    samples = 2 * pairs * config.sample.num_solver_steps
    if steps > samples:
        raise UserError(f"{steps} gradient steps an epoch are more than its {samples} samples: lower --gradient-steps-per-epoch.")
    largest = config.max_batch_size if config.max_batch_size is not None else (13 if world_size >= 8 else 6)
    for flag, value in (("--max-batch-size", largest), ("--sample.batch-size", config.sample.batch_size or 1)):
        if value < 1:
            raise UserError(f"{flag} is {value}: give a whole number of 1 or more.")
    shares = tuple(pairs * (rank + 1) // world_size - pairs * rank // world_size for rank in range(world_size))
    sample_batch = _micro_batch(max(shares), largest, config.sample.batch_size, "--sample.batch-size")
    share_of_step = -(-samples // (steps * world_size))
    train_batch = _micro_batch(share_of_step, largest, config.train.batch_size, "--train.batch-size")
    return BatchPlan(shares, samples, steps, sample_batch, train_batch)


def _micro_batch(count: int, largest: int, wanted: int | None, flag: str) -> int:
    if wanted is not None:
        if not 1 <= wanted <= largest:
            raise UserError(f"{flag} {wanted} is not between 1 and --max-batch-size {largest}: change one of the two.")
        return min(wanted, count)
    batches = -(-count // largest)
    return -(-count // batches)


def plan_churn(churn: ChurnConfig) -> dict[str, float]:
    """The numbers of the churn schedule, each left-out one at its schedule's default (METHOD.md 2)."""
    numbers = dict(CHURN_DEFAULTS[churn.schedule])
    for name in ("weight", "weight_sd", "mu", "sd", "soft_sd"):
        value = getattr(churn, name)
        if value is None:
            continue
        if name not in numbers:
            raise UserError(f"--churn.{name.replace('_', '-')} has no effect with --churn.schedule {churn.schedule}: leave it out.")
        if not math.isfinite(value) or (name != "mu" and value < 0) or (name == "soft_sd" and value == 0):
            raise UserError(f"--churn.{name.replace('_', '-')} is {value}: give a positive number.")
        numbers[name] = value
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# config.json


def config_to_json(config: object) -> str:
    """A frozen config dataclass as JSON text; config_from_json reads it back."""
    return json.dumps(config_to_dict(config), indent=2) + "\n"


def config_to_dict(config: object) -> dict:
    """A frozen config dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def config_from_json(text: str, source: str) -> TrainConfig:
    """The TrainConfig that config_to_json wrote. Raises UserError, naming the source, for anything else."""
    try:
        return _build(TrainConfig, json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{source} is not a run's config.json of this version ({error}): restore the file or start a new run.") from error


def _build(kind: type, values: dict):
    if not isinstance(values, dict):
        raise ValueError(f"{values!r} stands where {kind.__name__} should")
    fields = typing.get_type_hints(kind)
    unknown = set(values) - set(fields)
    if unknown:
        raise ValueError(f"unknown entries {sorted(unknown)}")
    arguments = {}
    for name, value in values.items():
        wanted = fields[name]
        if dataclasses.is_dataclass(wanted):
            value = _build(wanted, value)
        elif wanted is Path:
            value = Path(value)
        elif isinstance(value, list):
            value = tuple(value)
        arguments[name] = value
    return kind(**arguments)
