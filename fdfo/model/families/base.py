"""What the method asks of a base model: text, velocity, noise levels, latents, LoRA, pictures and licence (docs/bases.md)."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fdfo.config.errors import UserError
from fdfo.config.plan import ImageSettings
from fdfo.model.text import TextEmbeddings

LARGEST_SIDE = 1_000_000  # pixels, where the architecture has no bound of its own
APACHE = {"license": "apache-2.0"}


@dataclass(frozen=True)
class Licence:
    """The licence of a base model, which holds for its adapters too."""

    header: dict[str, str]  # for the hub, in the head of a model card
    text: str  # a sentence or two for the card


class Family:
    """The base: what most flow models have in common. A family sets the attributes and fills in the methods that raise."""

    pipeline: type[DiffusionPipeline]  # its class in diffusers
    title: str  # as sentences call it
    block_lists: tuple[str, ...]  # the transformer's lists of blocks; blocks are compiled, and their layers adapted
    licences: dict[str, Licence]  # by hub id
    training_text = image_text = 512  # most tokens of a prompt in training, and for generate.py and metrics.py
    text_batch = 16  # prompts that are encoded at a time
    half_range = False  # whether its activations stay within float16's range
    dynamic_text = False  # whether the number of text tokens differs from batch to batch, so that compiled blocks must not fix it
    guidance_offset = 0.0  # of the pipeline's own guidance_scale, whose 1 + guidance_offset means none

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe

    # -- text

    def text_length(self, wanted: int) -> int:
        """Return the number of text tokens: as wanted, but never more than the tokenizer was made for."""
        return min(wanted, self.pipe.tokenizer.model_max_length)

    def encode(self, prompts: list[str], length: int, device: torch.device) -> TextEmbeddings:
        """Encode at most text_batch prompts, with `length` tokens where the family fixes their number."""
        raise NotImplementedError

    # -- velocity

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        """Call the transformer: x [N, C, H, W], noise levels sigma [N] in [0, 1] -> v = dx / dsigma [N, C, H, W], without guidance."""
        raise NotImplementedError

    def guided(self, v_neg: torch.Tensor, v_pos: torch.Tensor, guidance: float) -> torch.Tensor:
        """Return the velocity with guidance (docs/method.md 1); 1 would mean none."""
        return v_neg + guidance * (v_pos - v_neg)

    def sigmas(self, steps: int, resolution: int) -> torch.Tensor:
        """Return the noise levels of T steps, from 1 to 0: [T + 1] float32."""
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(sigmas=even_levels(steps), mu=self.grid_shift(steps, resolution))
        return scheduler.sigmas.to(torch.float32)

    def grid_shift(self, steps: int, resolution: int) -> float | None:
        """Return mu, the shift of a grid that depends on the number of image tokens; None if the scheduler's is fixed."""
        return None

    # -- latents

    def sides(self) -> range:
        """Return the sides of images that the model can draw, pixels."""
        step = 2 * self.pipe.vae_scale_factor
        return range(step, LARGEST_SIDE + 1, step)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Return C, H, W of the latents of square images."""
        size = resolution // self.pipe.vae_scale_factor
        return (self.pipe.transformer.config.in_channels, size, size)

    def to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn latents of the flow into what the VAE decodes."""
        config = self.pipe.vae.config
        return latents / config.scaling_factor + config.shift_factor

    # -- LoRA and speed

    @staticmethod
    def lora_targets(transformer: nn.Module) -> list[str]:
        """Return full names of the linear layers that get a LoRA."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Return the transformer's blocks."""
        return [block for name in self.block_lists for block in getattr(self.pipe.transformer, name)]

    def speed_up_attention(self) -> None:
        """Put a faster attention with the same function into the transformer, if there is one."""

    # -- pictures

    def drawing(self, text: TextEmbeddings, empty: TextEmbeddings, settings: ImageSettings) -> dict[str, object]:
        """Return the arguments for the pipeline's own call that depend on the family: text, guidance, noise levels."""
        raise NotImplementedError

    # -- what a user should know

    def distilled(self, name: str) -> bool:
        """Return whether the model called name was distilled to few steps, by its settings, else by its name."""
        return "turbo" in name.lower()

    @classmethod
    def check_precision(cls, precision: str, name: str) -> None:
        """Raise UserError for float16 where the activations leave its range."""
        if precision == "fp16" and not cls.half_range:
            raise UserError(f"--precision fp16 overflows in {name} ({cls.title}), which then draws black: give --precision bf16.")


def even_levels(steps: int) -> list[float]:
    """Return T evenly spaced noise levels from 1 to 1 / T, which a scheduler then shifts."""
    return torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()


def block_layers(transformer: nn.Module, block_list: str, layers: Iterable[str]) -> list[str]:
    """Return full names of these layers of all blocks of a list."""
    layers = tuple(layers)
    return [f"{block_list}.{i}.{layer}" for i in range(len(getattr(transformer, block_list))) for layer in layers]
