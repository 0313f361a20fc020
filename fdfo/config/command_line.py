"""Reads the command lines, and checks what a single field cannot declare."""

import os
from collections.abc import Sequence
from typing import TypeVar

import tyro

from fdfo.config.errors import UserError
from fdfo.config.options import Options, check_options, flag_of
from fdfo.config.plan import plan_churn, plan_subset
from fdfo.config.presets import PRESETS, for_people, judged_by_people
from fdfo.config.tool_options import ExportConfig, GenerateConfig, MetricsConfig, ReportConfig, ServeConfig, VotesConfig
from fdfo.config.train_options import TrainConfig

T = TypeVar("T", bound=Options)
MOST_DRAWN, MOST_SCORED = 10_000, 1_000_000  # images of one call of generate.py and of metrics.py, which keeps them all in memory


def parse(kind: type[T], argv: Sequence[str], quiet: bool = False, **settings: object) -> T:
    """Parse a command line into options whose values lie within their bounds. Raises UserError for one that does not."""
    check_no_empty_value(argv)
    options = tyro.cli(kind, args=list(argv), console_outputs=not quiet, **settings)
    check_options(options)
    return options


def check_no_empty_value(argv: Sequence[str]) -> None:
    """Raise UserError for a flag with an empty value, which a shell makes of a variable that is not set. A prompt may be empty."""
    for before, word in zip(("", *argv), argv, strict=False):
        flag = before if not word else word[:-1] if word.endswith("=") else ""
        if flag.startswith("--") and flag != "--prompts":
            raise UserError(f"{flag} is empty: give it a value, or leave it out.")


def parse_train_config(argv: Sequence[str], saved: TrainConfig | None = None, quiet: bool = False) -> TrainConfig:
    """Parse the command line of train.py over the defaults of --preset, or over the settings of the run to resume."""
    default = saved or PRESETS.get(flag_value(argv, "--preset"), PRESETS["sd35-medium"])
    config = parse(TrainConfig, argv, quiet, default=default)
    if saved is None and judged_by_people(config):
        config = parse(TrainConfig, argv, quiet, default=for_people(default))
    check_train_config(config)
    check_human_flags(argv, config)
    if config.reward_specs and flag_value(argv, "--reward-preset"):
        raise UserError("--reward-preset has no effect beside --reward-specs: leave one of them out.")
    if config.eval_prompts == 0:
        for flag in ("--eval-every", "--eval-prompt-set", "--eval-metrics", "--eval-least-diversity"):
            if flag_value(argv, flag):
                raise UserError(f"{flag} has no effect with --eval-prompts 0, which means no evaluation: leave one of them out.")
    return config


def check_human_flags(argv: Sequence[str], config: TrainConfig) -> None:
    """Raise UserError for flags of people who judge where nobody does."""
    names = [name for name in TrainConfig.__dataclass_fields__ if name.startswith("human_")]
    given = [flag_of(name) for name in [*names, "votes"] if flag_value(argv, flag_of(name))]
    if given and not judged_by_people(config):
        raise UserError(f"{given[0]} has no effect without people who judge: add --reward-preset human, or leave it out.")
    if config.votes is not None and given and given[0] != "--votes":
        raise UserError(f"{given[0]} has no effect with --votes, which takes recorded votes: leave one of them out.")


def flag_value(argv: Sequence[str], flag: str) -> str:
    """Return the value of a flag as tyro reads it: the last one, with '-' or '_', as two words or with '='."""
    value = ""
    for i, word in enumerate(argv):
        name, equals, rest = word.partition("=")
        if name.replace("_", "-") == flag:
            value = rest if equals else "".join(argv[i + 1 : i + 2])
    return value


def timeout_minutes(argv: Sequence[str]) -> float:
    """Return --timeout-minutes, which the processes need before they can read the rest together. Raises UserError."""
    text = flag_value(argv, "--timeout-minutes")
    try:
        minutes = float(text) if text else TrainConfig.timeout_minutes
    except ValueError as error:
        raise UserError(f"--timeout-minutes is {text}: give a number above 0, up to 100000.") from error
    check_options(TrainConfig(timeout_minutes=minutes))
    return minutes


def check_own_code(argv: Sequence[str], config: TrainConfig) -> None:
    """Raise UserError if only a config.json names code to run, or a server that gets prompts, images and the user's key: the file may
    be someone else's, so the user must name it too."""
    for flag, names in (("--reward-specs", config.reward_specs), ("--eval-metrics", config.eval_metrics)):
        if any(":" in name for name in names) and not flag_value(argv, flag):
            kind = "a server" if all("://" in name or ":" not in name for name in names) else "code of your own"
            raise UserError(f"The run to resume uses {kind}: say so again with {flag} {' '.join(names)}.")


def check_train_config(config: TrainConfig) -> None:
    """Raise UserError for values that no run can have together."""
    if config.keep_every is not None and config.keep_last is None:
        raise UserError("--keep-every has no effect without --keep-last, which bounds the checkpoints kept: give both.")
    if config.eval_prompts == 1:
        raise UserError("--eval-prompts is 1: give 2 or more, or 0 for no evaluation.")
    if len(set(config.eval_metrics)) < len(config.eval_metrics):
        raise UserError("--eval-metrics names a scorer twice: leave one out.")
    plan_churn(config.churn)
    plan_subset(config)


def parse_generate_config(argv: Sequence[str]) -> GenerateConfig:
    """Parse the command line of generate.py. Raises UserError."""
    config = parse(GenerateConfig, argv)
    if config.out.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise UserError(f"--out {config.out} is no image file: end it with .jpg or .png.")
    if config.grid_cols * config.grid_rows * max(1, len(config.prompts)) > MOST_DRAWN:
        raise UserError(f"--grid-cols x --grid-rows of all prompts is more than {MOST_DRAWN:,} images: lower one of them.")
    if config.prompts and config.prompt_file:
        raise UserError("--prompts and --prompt-file exclude each other: leave one out.")
    return config


def parse_metrics_config(argv: Sequence[str], quiet: bool = False) -> MetricsConfig:
    """Parse the command line of metrics.py. Raises UserError."""
    config = parse(MetricsConfig, argv, quiet)
    if not config.metrics:
        raise UserError("--metrics names no scorer: give one or more, such as --metrics pickscore.")
    if config.out is not None and config.out.suffix.lower() != ".json":
        raise UserError(f"--out {config.out} is no JSON file: end it with .json; a plot goes beside it.")
    if config.per_prompt and config.out is None:
        raise UserError("--per-prompt goes into the JSON file: add --out.")
    if config.num_prompts * config.num_repeats > MOST_SCORED:
        raise UserError(f"--num-prompts x --num-repeats is more than {MOST_SCORED:,} images: lower one of them.")
    if config.published_processes is not None and not config.as_published:
        raise UserError("--published-processes has no effect without --as-published: give both, or leave it out.")
    if config.images is not None:
        check_no_drawing(config)
    return config


DRAWING_FIELDS = (
    "checkpoint", "preset", "pretrained_model", "num_prompts", "num_repeats", "save_images", "prompt_seed", "image_seed",
    "published_processes", "width", "height", "num_inference_steps", "guidance_scale", "batch_size",
)  # fmt: skip


def check_no_drawing(config: MetricsConfig) -> None:
    """Raise UserError for flags that say how to draw, beside --images, which draws nothing."""
    for name in DRAWING_FIELDS:
        if getattr(config, name) != MetricsConfig.__dataclass_fields__[name].default:
            raise UserError(f"{flag_of(name)} has no effect with --images, which scores a folder: leave it out.")
    if config.as_published and config.prompt_set != "hpdv2" and "pickscore" not in config.metrics:
        raise UserError("--as-published has an effect with --images on pickscore and on hpdv2 alone: leave it out.")


def parse_export_config(argv: Sequence[str]) -> ExportConfig:
    """Parse the command line of fdfo.export. Raises UserError."""
    config = parse(ExportConfig, argv, prog="python -m fdfo.export", config=(tyro.conf.PositionalRequiredArgs,))
    if (config.lora is None) == (config.merge is None):
        raise UserError("Give either --lora FOLDER or --merge FOLDER: one of them in a call.")
    for flag, folder in (("--lora", config.lora), ("--merge", config.merge)):
        if folder is not None and os.path.lexists(folder):
            raise UserError(f"{folder} exists already: give {flag} the name of a new folder.")
    if config.format is not None and config.lora is None:
        raise UserError("--format has no effect without --lora, since a merged pipeline has no LoRA: leave it out.")
    if config.dtype is not None and config.merge is None:
        raise UserError("--dtype has no effect without --merge, since a LoRA is written in float32: leave it out.")
    return config


def parse_report_config(argv: Sequence[str]) -> ReportConfig:
    """Parse the command line of fdfo.report. Raises UserError."""
    config = parse(ReportConfig, argv, prog="python -m fdfo.report", config=(tyro.conf.PositionalRequiredArgs,))
    if not config.runs:
        raise UserError("No run is named: give one or more run folders, such as runs/00000-scene-cfg_1p0.")
    if config.out is not None and config.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {config.out} is no HTML file: end it with .html.")
    if config.watch and len(config.runs) > 1:
        raise UserError("--watch is for one run: name one run folder, or leave --watch out.")
    return config


def parse_votes_config(argv: Sequence[str]) -> VotesConfig:
    """Parse the command line of fdfo.votes. Raises UserError."""
    config = parse(VotesConfig, argv, prog="python -m fdfo.votes", config=(tyro.conf.PositionalRequiredArgs,))
    if config.export is not None and os.path.lexists(config.export):
        raise UserError(f"{config.export} exists already: give --export the name of a new folder.")
    return config


def parse_serve_config(argv: Sequence[str]) -> ServeConfig:
    """Parse the command line of rewards.serve. Raises UserError."""
    return parse(ServeConfig, argv, prog="python -m rewards.serve", config=(tyro.conf.PositionalRequiredArgs,))
