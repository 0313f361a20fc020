"""What comes from the hub or a folder: pipelines and adapter folders, and the ways in which they cannot be had."""

import contextlib
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import diffusers
import httpx
import torch
import transformers
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from fdfo.config import UserError
from fdfo.tiny import TINY_MODEL

BUNDLED_MODELS = {"tiny": TINY_MODEL}
ADAPTER = "adapter_model.safetensors"
HUB_URL = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/tree/([\w.-]+)/([\w./-]+?)/?")
HUB_SHORT = re.compile(r"hf:([\w.-]+/[\w.-]+)/([\w./-]+?)/?")


def load_pipeline(name: str, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """StableDiffusion3Pipeline from a hub id, a folder or the bundled "tiny", on the CPU. Raises UserError when it cannot be had."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    argument = "dtype" if tuple(map(int, version("diffusers").split(".")[:2])) >= (0, 42) else "torch_dtype"
    with hub_errors(name):
        return StableDiffusion3Pipeline.from_pretrained(str(BUNDLED_MODELS.get(name, name)), **{argument: dtype})


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns the ways in which a model cannot be had into one sentence."""
    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated: accept its licence on https://huggingface.co/{name} and run `hf auth login`, then start again."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"The hub has no repository {name}, or it is private or gated: check the name, accept its licence, `hf auth login`."
        ) from error
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
        raise UserError(
            f"{name} cannot be loaded ({reason}): check the name and the network; for a gated model accept its licence "
            "and run `hf auth login`; a folder must hold a complete model."
        ) from error


def check_adapter_files(folder: Path, name: object) -> None:
    """Raises UserError unless the folder, which the user calls name, holds the two files of a PEFT adapter."""
    if not (folder / "adapter_config.json").is_file() or not (folder / ADAPTER).is_file():
        raise UserError(
            f"{name} holds no adapter: give a folder with adapter_config.json and {ADAPTER}, such as "
            "runs/00000-NAME/checkpoints/epoch-0000005, or a run folder."
        )


def download_folder(text: str) -> Path:
    """One folder of a hub repository, from the cache where it is there already. Raises UserError."""
    if match := HUB_URL.fullmatch(text):
        repository, revision, folder = match.groups()
    elif match := HUB_SHORT.fullmatch(text):
        (repository, folder), revision = match.groups(), "main"
    else:
        raise UserError(
            f"{text} is not a folder on the hub: write https://huggingface.co/OWNER/NAME/tree/REVISION/FOLDER or hf:OWNER/NAME/FOLDER."
        )
    if ".." in folder.split("/"):
        raise UserError(f"{text} points outside its repository: give a plain folder name.")
    with hub_errors(repository):
        root = snapshot_download(repository, revision=revision, allow_patterns=[f"{folder}/*"])
    return Path(root) / folder
