"""Z-Image."""

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel

from fdfo.config.plan import ImageSettings
from fdfo.config.train_options import Z_IMAGE
from fdfo.model.families.base import APACHE, Family, Licence, block_layers, even_levels
from fdfo.model.text import TextEmbeddings

LORA_TARGETS = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
TURBO_SHIFT = 3.0  # of the scheduler of Z-Image-Turbo; the base model's is 6


class ZImage(Family):
    """A Qwen3's last hidden state but one as text, of each prompt's own length, on which the places of image tokens depend."""

    pipeline = ZImagePipeline
    title = "Z-Image"
    block_lists = ("layers", "noise_refiner", "context_refiner")
    licences = {Z_IMAGE: Licence(APACHE, "Apache-2.0, as the base model.")}
    dynamic_text = True
    guidance_offset = -1.0  # its pipeline computes v_pos + g (v_pos - v_neg)

    def encode(self, prompts: list[str], length: int, device: torch.device) -> TextEmbeddings:
        """Return tokens [N, L, D] and their true numbers; L is the largest, at most `length`."""
        tokens, _ = self.pipe.encode_prompt(
            prompt=list(prompts), device=device, do_classifier_free_guidance=False, max_sequence_length=length
        )  # which changes the list of prompts that it is given
        lengths = torch.tensor([len(own) for own in tokens])
        return TextEmbeddings(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), None, lengths)

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        """The transformer's time runs from noise to data, and so does its output: hence 1 - sigma, and the sign."""
        frames = list(x.float().unsqueeze(2))  # N times [C, 1, H, W]
        output = self.pipe.transformer(frames, 1 - sigma, text.own_tokens(), return_dict=False)[0]
        return -torch.stack(list(output))[:, :, 0]

    def sides(self) -> range:
        """Return multiples of a token's side, up to what the positions cover."""
        step = super().sides().step
        return range(step, self.pipe.transformer.config.axes_lens[1] * step + 1, step)

    @staticmethod
    def lora_targets(transformer: ZImageTransformer2DModel) -> list[str]:
        """Return the attention's linear layers of the main blocks; the refiners are not adapted."""
        return block_layers(transformer, "layers", LORA_TARGETS)

    def drawing(self, text: TextEmbeddings, empty: TextEmbeddings, settings: ImageSettings) -> dict[str, object]:
        return {
            "prompt_embeds": text.own_tokens(),
            "negative_prompt_embeds": empty.own_tokens(),
            "guidance_scale": settings.guidance + self.guidance_offset,
            "sigmas": even_levels(settings.steps),  # before diffusers 0.39 the pipeline's own grid was another
        }

    def distilled(self, name: str) -> bool:
        return super().distilled(name) or self.pipe.scheduler.config.shift == TURBO_SHIFT
