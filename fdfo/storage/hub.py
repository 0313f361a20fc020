"""Loads from the Hub or disk: pipelines, adapter folders and prompt sets; turns failures into one-line errors."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from fdfo.config.errors import UserError, brief
from fdfo.storage.atomic_files import write_text
from fdfo.storage.prompts import PROMPT_SETS, load_prompts
from fdfo.tiny import TINY_MODEL

BUNDLED_MODELS = {"tiny": TINY_MODEL}
INDEX = "model_index.json"  # of a pipeline
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers' load_lora_weights looks for
LORA_SUFFIX = ".safetensors"
HPDV2 = "zhwang/HPDv2"
HPDV2_STYLES, HPDV2_SIZE = ("anime", "concept-art", "paintings", "photo"), 3200
HUB_URL = re.compile(
    r"https://huggingface\.co/([\w.-]+/[\w.-]+?)(?:/(?:tree|blob|resolve)/([\w.-]+)(?:/([\w./-]+?))?)?/?", re.ASCII
)
HUB_SHORT = re.compile(r"hf:([\w.-]+/[\w.-]+?)()(?:/([\w./-]+?))?/?", re.ASCII)
TransportError = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)  # httpx's in hub 1, httpx2's in hub 2
diffusers.utils.logging.disable_progress_bar()  # a bar for every part of every model, on every rank
transformers.utils.logging.disable_progress_bar()


def pipeline_class(name: str) -> str:
    """Return the name of the class of the pipeline in a folder, on the hub, or of the bundled "tiny". Raises UserError."""
    folder = Path(BUNDLED_MODELS.get(name, name))
    with hub_errors(name):
        file = folder / INDEX if folder.is_dir() else hf_hub_download(name, INDEX)
        index = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(index, dict):
            raise ValueError(f"its {INDEX} is not an object")
        return str(index.get("_class_name"))


def load_pipeline(kind: type[DiffusionPipeline], name: str, dtype: torch.dtype) -> DiffusionPipeline:
    """Load a pipeline of this class from a hub id, a folder or the bundled "tiny", onto the CPU. Raises UserError."""
    argument = "dtype" if tuple(map(int, version("diffusers").split(".")[:2])) >= (0, 42) else "torch_dtype"
    with hub_errors(name):
        return kind.from_pretrained(str(BUNDLED_MODELS.get(name, name)), use_safetensors=True, **{argument: dtype})


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn every way in which loading fails into one sentence."""
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
            f"{name} cannot be loaded ({brief(error)}): check the name and the network; for a gated model accept its licence "
            "and run `hf auth login`; a folder must hold a complete model."
        ) from error


def check_adapter_files(folder: Path, name: object) -> None:
    """Raise UserError unless the folder, which the user calls name, holds the two files of a PEFT adapter."""
    if not all(os.path.isfile(folder / file) for file in (ADAPTER_CONFIG, ADAPTER)):
        raise UserError(
            f"{str(name)[:300]} holds no adapter: give a folder with {ADAPTER_CONFIG} and {ADAPTER}, such as "
            f"runs/00000-NAME/checkpoints/epoch-0000005, a run folder, or a LoRA file ({LORA_SUFFIX})."
        )


@dataclass(frozen=True)
class HubPlace:
    """A folder of a model repository on the hub, or a LoRA file in it."""

    repository: str  # OWNER/NAME
    revision: str
    folder: PurePosixPath  # in the repository; "." is its root

    @property
    def path(self) -> PurePosixPath:
        """OWNER/NAME/FOLDER."""
        return PurePosixPath(self.repository) / self.folder


def hub_place(text: str) -> HubPlace | None:
    """Return what a hub name means, None for the name of something on this machine. Raises UserError for a malformed one.

    Hub names are https://huggingface.co/OWNER/NAME, the same with /tree/REVISION or /tree/REVISION/FOLDER, and hf:OWNER/NAME or
    hf:OWNER/NAME/FOLDER. Without a folder the adapter lies at the root of the repository; without a revision it is main.
    """
    if "://" not in text and not text.startswith("hf:"):
        return None
    match = HUB_URL.fullmatch(text) or HUB_SHORT.fullmatch(text)
    if match is None:
        raise UserError(
            f"{text[:300]!r} is not a folder on the hub: write https://huggingface.co/OWNER/NAME/tree/REVISION/FOLDER or "
            "hf:OWNER/NAME/FOLDER, and leave FOLDER out if the adapter lies at the root."
        )
    repository, revision, folder = match[1], match[2] or "main", match[3] or ""
    if {"..", "."} & {*repository.split("/"), revision, *folder.split("/")} or "" in (folder or "x").split("/"):
        raise UserError(f"{text[:300]!r} points outside its repository: give plain names.")
    return HubPlace(repository, revision, PurePosixPath(folder))


def download_folder(place: HubPlace) -> Path:
    """Download the adapter in one folder of a hub repository, or the LoRA file that the place names, unless it is cached.

    If the folder holds no PEFT adapter, its LoRA file in diffusers' format is taken. Raises UserError.
    """
    if place.folder.suffix == LORA_SUFFIX:
        return download_files(place, [place.folder]) / place.folder
    root = download_files(place, [place.folder / ADAPTER_CONFIG, place.folder / ADAPTER])
    if not (root / place.folder / ADAPTER_CONFIG).is_file():
        root = download_files(place, [place.folder / LORA_FILE])
    return root / place.folder


def download_files(place: HubPlace, files: list[PurePosixPath]) -> Path:
    """Download those of the files that the repository has; return the folder that stands for its root. Raises UserError."""
    with hub_errors(place.repository):
        return Path(snapshot_download(place.repository, revision=place.revision, allow_patterns=list(map(str, files))))


def load_prompt_set(name: str, as_published: bool = False) -> list[str]:
    """Load the prompts of a set by its name, or of a text file; fetch hpdv2 on its first use. Raises UserError.

    as_published: hpdv2 has the strings of its JSON files as they are, with line breaks and blanks at the ends.
    """
    return read_hpdv2() if as_published and name == "hpdv2" else load_prompts(fetch_prompt_set(name))


def read_hpdv2() -> list[str]:
    """Read the prompts of hpdv2 from the hub, or from its cache. Raises UserError."""
    prompts = []
    with hub_errors(f"The prompt set hpdv2 (hub dataset {HPDV2})"):
        for style in HPDV2_STYLES:
            file = hf_hub_download(HPDV2, f"benchmark/{style}.json", repo_type="dataset")
            part = json.loads(Path(file).read_text(encoding="utf-8"))
            if not isinstance(part, list) or not all(isinstance(prompt, str) and prompt.strip() for prompt in part):
                raise ValueError(f"benchmark/{style}.json is not a list of prompts")
            prompts += part
        if len(prompts) != HPDV2_SIZE:
            raise ValueError(f"it has {len(prompts)} prompts, {HPDV2_SIZE} were published")
    return prompts


def fetch_prompt_set(name: str) -> str:
    """Fetch hpdv2 into prompt_sets/ on its first use, whole or not at all; return the name. Raises UserError."""
    path = PROMPT_SETS / "hpdv2.txt"
    if name != "hpdv2" or path.is_file():
        return name
    prompts = [" ".join(prompt.splitlines()) for prompt in read_hpdv2()]  # a line is a prompt
    try:
        write_text(path, "\n".join(prompts) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): make the folder writable.") from error
    return name
