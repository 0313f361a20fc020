"""Finds the family of a base model by the class in its model_index.json, and that of an adapter by the names of its layers."""

from collections.abc import Iterable
from pathlib import Path

import torch

from fdfo.config.errors import UserError
from fdfo.model.families.base import Family
from fdfo.model.families.flux2_klein import Flux2Klein
from fdfo.model.families.sd3 import StableDiffusion3
from fdfo.model.families.z_image import ZImage
from fdfo.storage.hub import load_pipeline, pipeline_class

FAMILIES: dict[str, type[Family]] = {kind.pipeline.__name__: kind for kind in (StableDiffusion3, Flux2Klein, ZImage)}


def find_family(name: str) -> type[Family]:
    """Return the family of the model in a folder, on the hub, or of the bundled "tiny". Raises UserError for all others."""
    found = pipeline_class(name)
    if found not in FAMILIES:
        raise UserError(f"{name} is a {found}, which FDFO does not train: give one of {', '.join(FAMILIES)}.")
    return FAMILIES[found]


def load_family(name: str, dtype: torch.dtype) -> Family:
    """Load a model with its family, onto the CPU. Raises UserError."""
    kind = find_family(name)
    return kind(load_pipeline(kind.pipeline, name, dtype))


def family_of_layers(modules: Iterable[str]) -> type[Family] | None:
    """Return the family whose transformer has these layers, by its lists of blocks; None if there is none.

    A family with more lists has those of another among them, so the one with the fewest is meant.
    """
    lists = {module.partition(".")[0] for module in modules}
    fitting = [kind for kind in FAMILIES.values() if lists and lists <= set(kind.block_lists)]
    return min(fitting, key=lambda kind: len(kind.block_lists), default=None)


def check_same_family(family: Family, modules: Iterable[str], source: Path, name: str) -> None:
    """Raise UserError if the adapter of the source, with these layers, is one of another family than the model called name."""
    own = family_of_layers(modules)
    if own is not None and own is not type(family):
        raise UserError(
            f"The adapter {source} is one of {own.title}, {name} is {family.title}: give an adapter, or a --pretrained-model, of the other's "
            "family."
        )
