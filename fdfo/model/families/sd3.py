"""Stable Diffusion 3 and 3.5: Medium and Large, and the bundled tiny model."""

import logging

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from fdfo.config.plan import ImageSettings
from fdfo.config.train_options import SD35_LARGE, SD35_MEDIUM
from fdfo.model.families.base import APACHE, Family, Licence, block_layers
from fdfo.model.lora_attention import GroupedJointAttention
from fdfo.model.text import TextEmbeddings

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class Once(logging.Filter):
    """Show the pipeline's warning about long prompts once, without the prompts, instead of for each prompt in every epoch."""

    told = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "truncated" not in record.getMessage():
            return True
        record.msg, record.args = "Some prompts are longer than a text encoder reads; they are truncated.", ()
        first, self.told = not self.told, True
        return first


logging.getLogger("diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3").addFilter(Once())


def community_licence(base: str) -> Licence:
    """Return the licence of one of Stability's models."""
    link = f"https://huggingface.co/{base}/blob/main/LICENSE.md"
    return Licence(
        {"license": "other", "license_name": "stabilityai-ai-community", "license_link": link},
        f"Powered by Stability AI. Derived from [{base}](https://huggingface.co/{base}). This Stability AI Model is licensed under the "
        f"[Stability AI Community License]({link}), Copyright © Stability AI Ltd. All Rights Reserved. That licence holds for these "
        "weights, too.",
    )


class StableDiffusion3(Family):
    """CLIP-L, CLIP-G and T5 tokens, and CLIP's pooled vectors; all tokens attend to all."""

    pipeline = StableDiffusion3Pipeline
    title = "Stable Diffusion 3"
    block_lists = ("transformer_blocks",)
    licences = {base: community_licence(base) for base in (SD35_MEDIUM, SD35_LARGE)} | {
        "tiny": Licence(APACHE, "Apache-2.0, as the base model.")
    }
    training_text, image_text = 128, 256  # T5's tokens
    half_range = True

    def text_length(self, wanted: int) -> int:
        """Return the number of T5 tokens: as wanted, but never more than the model was trained for (docs/method.md 4 and 5)."""
        return min(wanted, self.pipe.tokenizer_3.model_max_length)

    def encode(self, prompts: list[str], length: int, device: torch.device) -> TextEmbeddings:
        """Return tokens [N, L, D], CLIP's, then T5's, and pooled [N, D']."""
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return TextEmbeddings(tokens, pooled)

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        return self.pipe.transformer(x, text.tokens, text.pooled, timestep=1000 * sigma, return_dict=False)[0]

    def sigmas(self, steps: int, resolution: int) -> torch.Tensor:
        """Return the scheduler's own grid, which does not depend on the resolution."""
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        return scheduler.sigmas.to(torch.float32)

    def sides(self) -> range:
        """Return multiples of a token's side, up to what the position embedding covers."""
        step = self.pipe.vae_scale_factor * self.pipe.patch_size
        return range(step, self.pipe.transformer.config.pos_embed_max_size * step + 1, step)

    @staticmethod
    def lora_targets(transformer: SD3Transformer2DModel) -> list[str]:
        """Return the joint attention's linear layers; the last block has no to_add_out, attn2 is not adapted."""
        return block_layers(transformer, "transformer_blocks", (f"attn.{target}" for target in LORA_TARGETS))[:-1]

    def speed_up_attention(self) -> None:
        self.pipe.transformer.set_attn_processor(GroupedJointAttention())

    def drawing(self, text: TextEmbeddings, empty: TextEmbeddings, settings: ImageSettings) -> dict[str, object]:
        return {
            "prompt_embeds": text.tokens,
            "pooled_prompt_embeds": text.pooled,
            "negative_prompt_embeds": empty.tokens,
            "negative_pooled_prompt_embeds": empty.pooled,
            "guidance_scale": settings.guidance,
        }
