"""FLUX.2-klein base, 4B and 9B."""

import torch
import torch.nn.functional as F
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from fdfo.config.plan import ImageSettings
from fdfo.config.train_options import KLEIN_4B, KLEIN_9B
from fdfo.model.families.base import APACHE, Family, Licence, block_layers, even_levels
from fdfo.model.families.sd3 import LORA_TARGETS
from fdfo.model.text import TextEmbeddings

SINGLE_TARGETS = ("attn.to_qkv_mlp_proj", "attn.to_out")
KLEIN_9B_LICENCE = f"https://huggingface.co/{KLEIN_9B}/blob/main/LICENSE.md"


class Flux2Klein(Family):
    """Three hidden states of a Qwen3 as text, all 512 tokens of which are attended to; latents of 2 x 2 patches, normalised."""

    pipeline = Flux2KleinPipeline
    title = "FLUX.2-klein"
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    licences = {
        KLEIN_4B: Licence(APACHE, "Apache-2.0, as the base model."),
        KLEIN_9B: Licence(
            {"license": "other", "license_name": "flux-non-commercial-license", "license_link": KLEIN_9B_LICENCE},
            f"The [FLUX Non-Commercial License]({KLEIN_9B_LICENCE}) of the base model holds for these weights, too.",
        ),
    }
    text_batch = 4  # the pipeline computes the logits of all tokens, 0.6 GB for 4 prompts

    def encode(self, prompts: list[str], length: int, device: torch.device) -> TextEmbeddings:
        """Return tokens [N, length, 3 D]."""
        tokens, _ = self.pipe.encode_prompt(prompt=prompts, device=device, max_sequence_length=length)
        return TextEmbeddings(tokens)

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        (height, width), length = x.shape[-2:], text.tokens.shape[1]
        # The transformer rounds sigma to the type of x: float32, so that stored latents in bfloat16 see the level that sampled them.
        v = self.pipe.transformer(
            hidden_states=x.float().flatten(2).transpose(1, 2),  # [N, H W, C]
            timestep=sigma,
            guidance=None,
            encoder_hidden_states=text.tokens,
            img_ids=positions(1, height, width, 1, device=x.device),
            txt_ids=positions(1, 1, 1, length, device=x.device),
            return_dict=False,
        )[0]
        return v.transpose(1, 2).unflatten(2, (height, width))

    def grid_shift(self, steps: int, resolution: int) -> float:
        _, height, width = self.latent_shape(resolution)
        return compute_empirical_mu(height * width, steps)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        size = resolution // (2 * self.pipe.vae_scale_factor)
        return (self.pipe.transformer.config.in_channels, size, size)

    def to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """Undo the normalisation [N, C, H, W], then the patches -> [N, C / 4, 2 H, 2 W]."""
        norm, epsilon = self.pipe.vae.bn, self.pipe.vae.config.batch_norm_eps
        scale, shift = (norm.running_var.float() + epsilon).sqrt(), norm.running_mean.float()  # [C]
        return F.pixel_shuffle(latents * scale[:, None, None] + shift[:, None, None], 2)

    @staticmethod
    def lora_targets(transformer: Flux2Transformer2DModel) -> list[str]:
        """Return the attention's linear layers of both streams, and the two large ones of the single blocks."""
        double = block_layers(transformer, "transformer_blocks", (f"attn.{target}" for target in LORA_TARGETS))
        return double + block_layers(transformer, "single_transformer_blocks", SINGLE_TARGETS)

    def drawing(self, text: TextEmbeddings, empty: TextEmbeddings, settings: ImageSettings) -> dict[str, object]:
        return {
            "prompt_embeds": text.tokens,
            "negative_prompt_embeds": empty.tokens,
            "guidance_scale": settings.guidance,
            "sigmas": even_levels(settings.steps),
        }

    def distilled(self, name: str) -> bool:
        """Return whether model_index.json says so: all klein models but those with "base" in their name are."""
        return bool(self.pipe.config.is_distilled)


def positions(*sizes: int, device: torch.device) -> torch.Tensor:
    """Return all positions of a grid of four axes, time, row, column and text: [product of the sizes, 4] int64."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))
