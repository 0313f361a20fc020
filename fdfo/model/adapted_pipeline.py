"""A frozen pipeline on one device, with a LoRA on its transformer (docs/method.md 4)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict

from fdfo.distributed.launch import check_device
from fdfo.model.acceleration import PinnedWeights
from fdfo.model.families.registry import check_same_family, find_family, load_family
from fdfo.model.lora import attach_lora, completed, fill_lora
from fdfo.storage.adapters import read_lora_adapter

COMPUTE_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class AdaptedPipeline:
    """The pipeline with its LoRA: loading, switching and copying the LoRA, moving the parts between host and device."""

    def __init__(self, name: str, precision: str, device: torch.device):
        """Load the pipeline from a hub id or a folder, frozen: float32 for precision fp32, else bfloat16 (docs/method.md 4).

        Raises UserError if it cannot be loaded, if a half precision is asked for without a GPU, or float16 of a model that overflows.
        """
        check_device(precision, device)
        self.name, self.precision, self.device = name, precision, device
        self.compute_type = COMPUTE_TYPES[precision]
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        find_family(name).check_precision(precision, name)
        self.family = load_family(name, self.dtype)
        self.pipe.set_progress_bar_config(disable=True)
        for module in self._modules():
            module.requires_grad_(False).eval()
        self.pipe.vae.to(memory_format=torch.channels_last)
        self.peft = None
        self.waiting_text: PinnedWeights | None = None

    @property
    def pipe(self) -> DiffusionPipeline:
        return self.family.pipe

    @property
    def lora_targets(self) -> list[str]:
        """Full names of the linear layers that have a LoRA."""
        return self.family.lora_targets(self.pipe.transformer)

    def _modules(self) -> list[torch.nn.Module]:
        return [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]

    # -- adapter

    def add_lora(self, rank: int, alpha: int, seed: int) -> None:
        """Add a fresh float32 LoRA (docs/method.md 4): Gaussian A from the seed, B = 0."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            targets = self.lora_targets
            config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)
            self.peft = attach_lora(self.pipe.transformer, targets, config, self.name)

    def load_adapter(self, source: Path, seed: int | None = None) -> None:
        """Load the adapter in a folder of PEFT's, or in the LoRA file of another program, in place of any other.

        seed: layers that the adapter leaves out start as those of a fresh LoRA; without a seed it must have all of them. Raises
        UserError if it does not fit this transformer.
        """
        adapter = read_lora_adapter(source)
        check_same_family(self.family, adapter.modules, source, self.name)
        self.remove_adapter()
        config, fresh, targets = adapter.config, set(), self.lora_targets
        if seed is not None:
            config, fresh = completed(self.pipe.transformer, targets, adapter, source)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed or 0)
            self.peft = attach_lora(self.pipe.transformer, targets, config, self.name)
        fill_lora(self.peft, adapter.tensors, fresh, source, self.name)

    def remove_adapter(self) -> None:
        """Go back to the base model."""
        if self.peft is not None:
            self.pipe.transformer, self.peft = self.peft.unload(), None

    def trainable(self) -> list[torch.nn.Parameter]:
        """Return the LoRA's parameters, in a fixed order."""
        return [parameter for _, parameter in self.named_trainable()]

    def named_trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Return the LoRA's parameters with their names, in a fixed order."""
        return [(name, p) for name, p in self.pipe.transformer.named_parameters() if "lora_" in name]

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """Return the adapter's tensors on the CPU, under the names of a PEFT adapter file."""
        state = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}

    def adapter_copy(self) -> list[torch.Tensor]:
        """Return a copy of the LoRA's parameters on the CPU, in the order of trainable()."""
        return [parameter.detach().to("cpu", copy=True) for parameter in self.trainable()]

    def lora_b(self) -> list[torch.Tensor]:
        """Return copies of the LoRA's B matrices, which are 0 until the first update."""
        return [parameter.detach().clone() for name, parameter in self.named_trainable() if "lora_B" in name]

    @torch.no_grad()
    def set_adapter(self, weights: list[torch.Tensor]) -> None:
        """Set the LoRA's parameters, in the order of trainable()."""
        for parameter, value in zip(self.trainable(), weights, strict=True):
            parameter.copy_(value)

    @contextlib.contextmanager
    def adapter_of(self, weights: list[torch.Tensor]) -> Iterator[None]:
        """Give the LoRA these parameters inside, and its own again afterwards."""
        own = self.adapter_copy()
        self.set_adapter(weights)
        try:
            yield
        finally:
            self.set_adapter(own)

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """Switch the adapter off inside."""
        if self.peft is None:
            yield
        else:
            with self.peft.disable_adapter():
                yield

    # -- devices

    def to_device(self, text_encoders: bool = True) -> None:
        """Move everything to the device; keep the text encoders in pinned host memory if they are not wanted on a GPU."""
        self.waiting_text = None
        stay = [] if text_encoders or self.device.type == "cpu" else self._text_encoders()
        for module in self._modules():
            if module not in stay:
                module.to(self.device)
        if stay:
            self.waiting_text = PinnedWeights(stay, self.device)

    def _text_encoders(self) -> list[torch.nn.Module]:
        return [part for name, part in self.pipe.components.items() if name.startswith("text_encoder")]

    @contextlib.contextmanager
    def text_encoders_loaded(self) -> Iterator[None]:
        """Bring the text encoders to the device inside."""
        with contextlib.nullcontext() if self.waiting_text is None else self.waiting_text.loaded():
            yield

    def drop_text_encoders(self) -> None:
        """Free their memory once every prompt is encoded."""
        self.pipe.register_modules(**{name: None for name in self.pipe.components if name.startswith("text_encoder")})
