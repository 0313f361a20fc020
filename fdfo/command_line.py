"""Reads and checks the command lines."""

import math
import os
import re
from collections.abc import Sequence

import tyro

from fdfo.config import PRESETS, ExportConfig, GenerateConfig, MetricsConfig, ReportConfig, TrainConfig, UserError
from fdfo.plan import plan_churn


def parse_train_config(argv: Sequence[str], saved: TrainConfig | None = None, quiet: bool = False) -> TrainConfig:
    """The command line of train.py over the defaults of --preset, or over those of the run that is resumed."""
    default = saved or PRESETS.get(flag_value(argv, "--preset"), PRESETS["sd35-medium"])
    config = tyro.cli(TrainConfig, args=list(argv), default=default, console_outputs=not quiet)
    check_train_config(config)
    if config.reward_specs and flag_value(argv, "--reward-preset"):
        raise UserError("--reward-preset has no effect beside --reward-specs: leave one of them out.")
    if config.eval_prompts == 0:
        for flag in ("--eval-every", "--eval-prompt-set", "--eval-metrics", "--eval-least-diversity"):
            if flag_value(argv, flag):
                raise UserError(f"{flag} has no effect with --eval-prompts 0, which means no evaluations: leave one of them out.")
    return config


def flag_value(argv: Sequence[str], flag: str) -> str:
    """The value of a flag on a command line, as tyro reads it: the last one, with '-' or '_', as two words or with '='."""
    value = ""
    for i, word in enumerate(argv):
        name, equals, rest = word.partition("=")
        if name.replace("_", "-") == flag:
            value = rest if equals else "".join(argv[i + 1 : i + 2])
    return value


def timeout_minutes(argv: Sequence[str]) -> float:
    """--timeout-minutes, which the processes need before they can read the rest together. Raises UserError."""
    text = flag_value(argv, "--timeout-minutes")
    try:
        return check_timeout(float(text)) if text else TrainConfig.timeout_minutes
    except ValueError as error:
        raise UserError(f"--timeout-minutes is {text}: give a number above 0, up to 100000.") from error


def check_timeout(minutes: float) -> float:
    if not 0 < minutes <= 1e5:
        raise UserError(f"--timeout-minutes is {minutes}: give a number above 0, up to 100000.")
    return minutes


def check_own_code(argv: Sequence[str], config: TrainConfig) -> None:
    """Raises UserError where a config.json alone names code to run: it may be someone else's file, so the user must name it too."""
    for flag, names in (("--reward-specs", config.reward_specs), ("--eval-metrics", config.eval_metrics)):
        if any(":" in name for name in names) and not flag_value(argv, flag):
            raise UserError(f"The run to resume uses code of your own: say so again with {flag} {' '.join(names)}.")


def check_train_config(config: TrainConfig) -> None:
    """Raises UserError for numbers that no run can have."""
    check_not_empty("--resume-from", config.resume_from)
    at_least_one = {
        "--sample.num-solver-steps": config.sample.num_solver_steps,
        "--sample.resolution": config.sample.resolution,
        "--num-epochs": config.num_epochs,
        "--save-freq": config.save_freq,
        "--lora-rank": config.lora_rank,
        "--lora-alpha": config.lora_alpha,
        "--total-pairs-per-epoch": config.total_pairs_per_epoch,
        "--gradient-steps-per-epoch": config.gradient_steps_per_epoch,
        "--eval-every": config.eval_every,
    }
    at_least_one |= {
        "--keep-last": 1 if config.keep_last is None else config.keep_last,
        "--keep-every": 1 if config.keep_every is None else config.keep_every,
    }
    for flag, value in at_least_one.items():
        if not 1 <= value <= 1_000_000:
            raise UserError(f"{flag} is {value}: give a whole number from 1 to 1,000,000.")
    if config.keep_every is not None and config.keep_last is None:
        raise UserError("--keep-every has no effect without --keep-last, which bounds the checkpoints kept: give both.")
    if config.eval_prompts is not None and config.eval_prompts != 0 and not 2 <= config.eval_prompts <= 1_000_000:
        raise UserError(f"--eval-prompts is {config.eval_prompts}: give 2 or more, or 0 for no evaluation.")
    if not 0 <= config.eval_least_diversity <= 1:
        raise UserError(f"--eval-least-diversity is {config.eval_least_diversity}: give a share of epoch 0's, from 0 to 1.")
    if len(set(config.eval_metrics)) < len(config.eval_metrics):
        raise UserError("--eval-metrics names a scorer twice: leave one out.")
    check_timeout(config.timeout_minutes)
    positive = {"learning-rate": config.train.learning_rate, "clip-range": config.train.clip_range}
    positive |= {"adam-epsilon": config.train.adam_epsilon, "max-grad-norm": config.train.max_grad_norm}
    for flag, value in positive.items():
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"--train.{flag} is {value}: give a number above 0.")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"--seed is {config.seed}: give a whole number from 0 to 2^63 - 1.")
    if config.sample.resolution % 16:
        raise UserError(f"--sample.resolution is {config.sample.resolution}: give a multiple of 16.")
    if config.run_name is not None and not re.fullmatch(r"[\w.-]+", config.run_name):
        raise UserError(f"--run-name {config.run_name!r} is no folder name: use letters, digits, '.', '_' and '-'.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config.train, name) < 1:
            raise UserError(f"--train.{name.replace('_', '-')} must lie in [0, 1).")
    for name in ("adam_weight_decay", "kl_weight"):
        if not 0 <= getattr(config.train, name) < math.inf:
            raise UserError(f"--train.{name.replace('_', '-')} must be 0 or more.")
    if not 1 <= config.sample.guidance_scale < math.inf:
        raise UserError("--sample.guidance-scale must be 1 (no guidance) or more.")
    plan_churn(config.churn)


def parse_generate_config(argv: Sequence[str]) -> GenerateConfig:
    config = tyro.cli(GenerateConfig, args=list(argv))
    if config.out.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise UserError(f"--out {config.out} is no picture file: end it with .jpg or .png.")
    check_not_empty("--checkpoint", config.checkpoint)
    if config.prompts and config.prompt_file:
        raise UserError("--prompts and --prompt-file exclude each other: leave one out.")
    if min(config.columns, config.grid_cols, config.grid_rows, config.batch_size) < 1 or not 0 <= config.seed < 2**31:
        raise UserError("--columns, --grid-cols, --grid-rows and --batch-size must be 1 or more, --seed in 0 to 2^31 - 1.")
    return config


def check_not_empty(flag: str, value: str | None) -> None:
    """Raises UserError for an empty text, which is what a shell makes of a variable that is not set."""
    if value == "":
        raise UserError(f"{flag} is empty: give a checkpoint, or leave the flag out.")


def parse_metrics_config(argv: Sequence[str], quiet: bool = False) -> MetricsConfig:
    config = tyro.cli(MetricsConfig, args=list(argv), console_outputs=not quiet)
    if not config.metrics:
        raise UserError("--metrics names no scorer: give one or more, such as --metrics pickscore.")
    if min(config.num_prompts, config.num_repeats, config.batch_size) < 1:
        raise UserError("--num-prompts, --num-repeats and --batch-size must be 1 or more.")
    if config.out is not None and config.out.suffix.lower() != ".json":
        raise UserError(f"--out {config.out} is no JSON file: end it with .json; a plot goes beside it.")
    for name in config.checkpoint:
        check_not_empty("--checkpoint", name)
    if config.per_prompt and config.out is None:
        raise UserError("--per-prompt goes into the JSON file: add --out.")
    if config.images is not None:
        check_no_drawing(config)
    if not 0 <= config.prompt_seed < 2**32 or not 0 <= config.image_seed < 2**31:
        raise UserError("--prompt-seed must lie in 0 to 2^32 - 1, --image-seed in 0 to 2^31 - 1.")
    return config


DRAWING_FIELDS = (
    "checkpoint", "preset", "pretrained_model", "num_prompts", "num_repeats", "save_images", "prompt_seed", "image_seed",
    "width", "height", "num_inference_steps", "guidance_scale", "batch_size",
)  # fmt: skip


def check_no_drawing(config: MetricsConfig) -> None:
    """Raises UserError for flags that say how to draw, where the pictures are there already."""
    for name in DRAWING_FIELDS:
        if getattr(config, name) != MetricsConfig.__dataclass_fields__[name].default:
            raise UserError(f"--{name.replace('_', '-')} has no effect with --images, which scores what is there: leave it out.")


def parse_export_config(argv: Sequence[str]) -> ExportConfig:
    config = tyro.cli(ExportConfig, prog="python -m fdfo.export", args=list(argv), config=(tyro.conf.PositionalRequiredArgs,))
    check_not_empty("the checkpoint", config.checkpoint)
    if config.lora is None and config.merge is None and config.push_to_hub is None:
        raise UserError("There is nothing to write: give --lora FOLDER, --merge FOLDER or --push-to-hub OWNER/NAME.")
    if config.lora is not None and config.merge is not None:
        raise UserError("--lora and --merge exclude each other: write them in two calls.")
    for flag, folder in (("--lora", config.lora), ("--merge", config.merge)):
        if folder is not None and os.path.lexists(folder):
            raise UserError(f"{folder} is there already: give {flag} the name of a new folder.")
    if config.dtype is not None and config.merge is None:
        raise UserError("--dtype has no effect without --merge, since a LoRA is written in float32: leave it out.")
    if config.public and config.push_to_hub is None:
        raise UserError("--public has no effect without --push-to-hub: leave it out.")
    if config.push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", config.push_to_hub, re.ASCII):
        raise UserError(f"--push-to-hub {config.push_to_hub!r} is no name on the hub: write OWNER/NAME.")
    return config


def parse_report_config(argv: Sequence[str]) -> ReportConfig:
    config = tyro.cli(ReportConfig, prog="python -m fdfo.report", args=list(argv), config=(tyro.conf.PositionalRequiredArgs,))
    if not config.runs:
        raise UserError("No run is named: give one or more run folders, such as runs/00000-scene-cfg_1p0.")
    if config.out is not None and config.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {config.out} is no HTML file: end it with .html.")
    return config
