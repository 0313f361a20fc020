"""What comes from the hub or a folder: pipelines and adapter folders, and the ways in which they cannot be had."""

import contextlib
import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import create_repo, hf_hub_download, model_info, snapshot_download, upload_folder
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from fdfo.adapter_config import check_adapter_config
from fdfo.config import UserError
from fdfo.manifest import is_file, read_bounded, read_json, write_whole
from fdfo.prompts import LARGEST_PROMPT_FILE, PROMPT_SETS
from fdfo.tiny import TINY_MODEL

BUNDLED_MODELS = {"tiny": TINY_MODEL}
ADAPTER = "adapter_model.safetensors"
HPDV2 = "zhwang/HPDv2"
HPDV2_STYLES, HPDV2_SIZE = ("anime", "concept-art", "paintings", "photo"), 3200
HUB_URL = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/tree/([\w.-]+)/([\w./-]+?)/?", re.ASCII)
HUB_SHORT = re.compile(r"hf:([\w.-]+/[\w.-]+)/([\w./-]+?)/?", re.ASCII)
TransportError = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)  # httpx's in hub 1, httpx2's in hub 2
LARGEST_ADAPTER = 2**33  # bytes; the method's adapter of SD3.5 Medium has 75 million
diffusers.utils.logging.disable_progress_bar()  # a bar for every part of every model, on every rank
transformers.utils.logging.disable_progress_bar()


def load_pipeline(name: str, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """StableDiffusion3Pipeline from a hub id, a folder or the bundled "tiny", on the CPU. Raises UserError when it cannot be had."""
    argument = "dtype" if tuple(map(int, version("diffusers").split(".")[:2])) >= (0, 42) else "torch_dtype"
    with hub_errors(name):
        return StableDiffusion3Pipeline.from_pretrained(
            str(BUNDLED_MODELS.get(name, name)), use_safetensors=True, **{argument: dtype}
        )


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
    except (OSError, ValueError, TransportError) as error:
        raise UserError(
            f"{name} cannot be loaded ({reason(error)}): check the name and the network; for a gated model accept its licence "
            "and run `hf auth login`; a folder must hold a complete model."
        ) from error


def reason(error: Exception) -> str:
    """The first line of an error's text that says anything."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


@contextlib.contextmanager
def push_errors(name: str) -> Iterator[None]:
    """Turns the ways in which nothing can be written to the hub into one sentence."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, TransportError) as error:  # RuntimeError is what the hub's Xet client raises
        raise UserError(
            f"{name} on the hub cannot be written ({reason(error)}): run `hf auth login` with a token that may write there, check the "
            "name and the network."
        ) from error


def open_repository(name: str, public: bool) -> str:
    """Makes OWNER/NAME on the hub where it does not exist; returns its address.

    Raises UserError where it cannot be written, or where one that exists is private or public against the caller's wish.
    """
    with push_errors(name):
        address = create_repo(name, private=not public, exist_ok=True)
        if model_info(name).private == public:
            are, advice = ("private", "leave --public out") if public else ("public", "add --public")
            raise UserError(f"{name} is on the hub already and is {are}: {advice}, or give another name.")
    return str(address)


def push_folder(folder: Path, name: str) -> None:
    """Uploads a folder's files in one commit. Raises UserError."""
    with push_errors(name):
        upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by fdfo.export")


def check_adapter_files(folder: Path, name: object) -> None:
    """Raises UserError unless the folder, which the user calls name, holds the two files of a PEFT adapter, of sane sizes.

    They may be anybody's.
    """
    if not is_file(folder / "adapter_config.json") or not is_file(folder / ADAPTER):
        raise UserError(
            f"{str(name)[:300]} holds no adapter: give a folder with adapter_config.json and {ADAPTER}, such as "
            "runs/00000-NAME/checkpoints/epoch-0000005, or a run folder."
        )
    try:
        check_adapter_config(read_json(folder / "adapter_config.json"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}/adapter_config.json is not the configuration of a plain LoRA adapter of PEFT ({error}): restore the file, or "
            "give another adapter."
        ) from error
    if (folder / ADAPTER).stat().st_size > LARGEST_ADAPTER:
        raise UserError(f"{folder}/{ADAPTER} has more than {LARGEST_ADAPTER} bytes: give a LoRA adapter.")


def download_folder(text: str) -> Path:
    """The adapter in one folder of a hub repository, from the cache where it is there already. Raises UserError."""
    if match := HUB_URL.fullmatch(text):
        repository, revision, folder = match.groups()
    elif match := HUB_SHORT.fullmatch(text):
        (repository, folder), revision = match.groups(), "main"
    else:
        raise UserError(
            f"{text[:300]!r} is not a folder on the hub: write https://huggingface.co/OWNER/NAME/tree/REVISION/FOLDER or hf:OWNER/NAME/FOLDER."
        )
    if {"..", ".", ""} & {*repository.split("/"), revision, *folder.split("/")}:
        raise UserError(f"{text[:300]!r} points outside its repository: give plain names.")
    with hub_errors(repository):
        files = [f"{folder}/{name}" for name in ("adapter_config.json", ADAPTER)]
        root = snapshot_download(repository, revision=revision, allow_patterns=files)
    return Path(root) / folder


def fetch_prompt_set(name: str) -> str:
    """Fetches hpdv2 into prompt_sets/ on its first use, whole or not at all; returns the name. Raises UserError."""
    path = PROMPT_SETS / "hpdv2.txt"
    if name != "hpdv2" or path.is_file():
        return name
    prompts = []
    with hub_errors(f"The prompt set hpdv2 (hub dataset {HPDV2})"):
        for style in HPDV2_STYLES:
            file = hf_hub_download(HPDV2, f"benchmark/{style}.json", repo_type="dataset")
            part = json.loads(read_bounded(Path(file), LARGEST_PROMPT_FILE).decode("utf-8"))
            if not isinstance(part, list) or not all(isinstance(prompt, str) and prompt.strip() for prompt in part):
                raise ValueError(f"benchmark/{style}.json is not a list of prompts")
            prompts += [" ".join(prompt.splitlines()) for prompt in part]  # a line is a prompt
        if len(prompts) != HPDV2_SIZE:
            raise ValueError(f"it has {len(prompts)} prompts, {HPDV2_SIZE} were published")
    try:
        write_whole(path, "\n".join(prompts) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): make the folder writable.") from error
    return name
