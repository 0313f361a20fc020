"""Which checkpoint a user means, what it belongs to, and whether it is whole."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from fdfo.command_line import check_train_config
from fdfo.config import TrainConfig, UserError
from fdfo.config_file import config_from_json
from fdfo.hub import ADAPTER, check_adapter_files, download_folder
from fdfo.lora_file import LORA_FILE
from fdfo.manifest import LARGEST_JSON, is_file, is_folder, read_bounded, sealed_state

AUTO, BEST = "auto", "best"
CFG_IN_NAME = re.compile(r"(no-cfg|cfg[-_](\d+)[.p](\d+))(?=[/_-]|$)")
CHECKPOINT_NAME = re.compile(r"epoch-(\d{7,})(?:-step-(\d{7,}))?")
STATE, TENSORS, EPOCH_START = "training_state.json", "training_state.safetensors", "epoch_start.safetensors"
CARD = "README.md"  # the model card, which is what the hub shows of a folder
FIXED_ON_RESUME = (
    "preset", "run_name", "seed", "vlm_model_name", "lora_rank", "lora_alpha", "pretrained_model", "prompt_set", "total_pairs_per_epoch", "gradient_steps_per_epoch",
    "sample", "churn", "reward_preset", "reward_specs", "precision", "eval_prompts", "eval_prompt_set", "eval_metrics",
)  # fmt: skip
FREE_FOR_AUTO = (
    "runs_dir", "num_epochs", "save_freq", "keep_last", "keep_every", "resume_from", "vlm_use_fsdp", "memory_efficient", "max_batch_size",
    "log_wandb", "strict", "timeout_minutes", "eval_every", "eval_least_diversity", "compile",
    "gradient_checkpointing", "offload_scorers", "offload_trajectories",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """An adapter folder, and the run it belongs to where it lies in one."""

    folder: Path
    run: Path | None  # the run folder, with a config.json

    @property
    def run_name(self) -> str:
        return self.run.name if self.run is not None else self.folder.resolve().parent.name

    @property
    def label(self) -> str:
        return f"{self.run_name}/{self.folder.name}"

    @property
    def resumable(self) -> bool:
        return self.run is not None and (self.folder / STATE).is_file()


def find_checkpoint(text: str) -> Checkpoint:
    """The checkpoint that a user names: a checkpoint folder, a run folder (its newest whole one), or a folder on the hub.

    Hub names are https://huggingface.co/OWNER/NAME/tree/REVISION/FOLDER and hf:OWNER/NAME/FOLDER; that folder's adapter
    alone is downloaded. Raises UserError when there is no adapter, or a training state beside it that is not whole.
    """
    hub = "://" in text or text.startswith("hf:")
    if hub:
        folder = download_folder(text)
    else:
        folder = Path(text)
        if folder.name == BEST and folder.is_symlink():
            folder = folder.resolve()
        if is_folder(folder / "checkpoints"):
            folder = newest_whole(folder)
            if folder is None:
                raise UserError(f"{text} holds no whole checkpoint: start the run anew, or give another folder.")
    if is_file(folder / STATE):
        read_state(folder)
    check_adapter_files(folder, text)
    parent = folder.resolve().parent
    in_run = not hub and parent.name == "checkpoints" and (parent.parent / "config.json").is_file()
    return Checkpoint(folder, parent.parent if in_run else None)


def find_run_checkpoint(text: str) -> Checkpoint:
    """find_checkpoint for training. Raises UserError also for a training state whose run's config is not there."""
    checkpoint = find_checkpoint(text)
    if checkpoint.run is None and (checkpoint.folder / STATE).is_file():
        raise UserError(
            f"{checkpoint.folder} has a training state, but no config.json two folders up: copy the whole run folder, or leave the "
            "training_state files out to start a new run from the adapter."
        )
    return checkpoint


def read_state(folder: Path) -> dict:
    """The training state of a checkpoint folder. Raises UserError unless all of the folder is as it was written."""
    return sealed_state(folder, STATE, ("adapter_config.json", ADAPTER, LORA_FILE, CARD, TENSORS, EPOCH_START))


def checkpoint_name(epochs: int, steps: int) -> str:
    """After whole epochs, and optimizer steps of the next one where there are any."""
    return f"epoch-{epochs:07d}" + (f"-step-{steps:07d}" if steps else "")


def position(folder: Path) -> tuple[int, int]:
    """Whole epochs and further optimizer steps, from a checkpoint folder's name."""
    epochs, steps = CHECKPOINT_NAME.fullmatch(folder.name).groups()
    return int(epochs), int(steps or 0)


def all_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, whole or not."""
    return sorted((p for p in (run / "checkpoints").glob("epoch-*") if CHECKPOINT_NAME.fullmatch(p.name)), key=position)


def run_checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints after whole epochs, oldest first. Raises UserError when there is none."""
    found = [folder for folder in all_checkpoints(run) if position(folder)[1] == 0 and (folder / STATE).is_file()]
    if not found:
        raise UserError(f"{run} holds no complete checkpoint yet: start the run anew, or give another folder.")
    return found


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint of a run that is as it was written; says which ones it had to pass over."""
    for folder in reversed(all_checkpoints(run)):
        try:
            read_state(folder)
        except UserError as error:
            print(f"warning: {folder.name} is passed over: {error}", flush=True)
        else:
            return folder
    return None


def find_own_run(config: TrainConfig) -> tuple[Checkpoint | None, Path | None]:
    """What --resume-from auto goes on from: the newest whole checkpoint of the config's own run, or its folder without any; says
    why it is none.

    That run is the folder in --runs-dir with the highest number whose config.json differs in FREE_FOR_AUTO at most; where
    there is none, neither is given.
    """
    wanted, newest_other = deciding_settings(config), None
    for folder in sorted(config.runs_dir.glob("[0-9]" * 5 + "-*"), reverse=True):
        try:
            saved = read_config(folder / "config.json")
        except UserError as error:
            print(f"warning: {folder.name} is passed over: {error}", flush=True)
            continue
        differing = [name for name, value in vars(deciding_settings(saved)).items() if value != getattr(wanted, name)]
        if not differing:
            newest = newest_whole(folder)
            return (None, folder) if newest is None else (Checkpoint(newest, folder), None)
        newest_other = newest_other or f"{folder.name} differs in {', '.join(differing)}"
    if newest_other is not None:
        print(f"no run in {config.runs_dir} has these settings, so a new one begins ({newest_other})", flush=True)
    return None, None


def deciding_settings(config: TrainConfig) -> TrainConfig:
    """The config with all that does not change a run's numbers at its default."""
    default = TrainConfig()
    return dataclasses.replace(
        config,
        sample=dataclasses.replace(config.sample, batch_size=None),
        train=dataclasses.replace(config.train, batch_size=None),
        **{name: getattr(default, name) for name in FREE_FOR_AUTO},
    )


def read_config(path: Path) -> TrainConfig:
    """A run's config.json, with numbers that a run can have. Raises UserError for anything else."""
    try:
        text = read_bounded(path, LARGEST_JSON).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a run's config.json ({error}): restore the file or start a new run.") from error
    config = config_from_json(text, str(path))
    check_train_config(config)
    return config


def saved_config(checkpoint: Checkpoint) -> TrainConfig | None:
    """The config of the run that a checkpoint belongs to."""
    return None if checkpoint.run is None else read_config(checkpoint.run / "config.json")


def trained_guidance(checkpoint: Checkpoint) -> float | None:
    """The guidance an adapter was trained with, by its run's config, or as published folders name it: ...-no-cfg, ...-cfg-4.5."""
    saved = saved_config(checkpoint)
    if saved is not None:
        return saved.sample.guidance_scale
    if not (match := CFG_IN_NAME.search(checkpoint.label)):
        return None
    return 1.0 if match[1] == "no-cfg" else float(f"{match[2]}.{match[3]}")


def drawing_settings(checkpoint: Checkpoint | None) -> tuple[TrainConfig | None, float | None]:
    """What plan_pictures takes from a checkpoint: its run's config and the guidance it was trained with, each where it is known."""
    return (None, None) if checkpoint is None else (saved_config(checkpoint), trained_guidance(checkpoint))


def guidance_warning(checkpoint: Checkpoint, used: float, flag: str = "--guidance-scale") -> str | None:
    """METHOD.md 5: an adapter trained with guidance w is sampled with w. flag: the one that would set it."""
    trained = trained_guidance(checkpoint)
    if trained is None or trained == used:
        return None
    return (
        f"warning: {checkpoint.label} was trained with guidance {trained:g} and is sampled with {used:g}: "
        f"{flag} {trained:g} suits it"
    )
