"""The text-to-image flow model: text embeddings, velocities and images of an adapted pipeline (docs/method.md 1 and 4)."""

from collections.abc import Callable, Sequence

import torch

from fdfo.config.errors import UserError
from fdfo.model.acceleration import cast_frozen_weights, checkpointing, fast_attention, pad_rows, try_compiled
from fdfo.model.adapted_pipeline import AdaptedPipeline
from fdfo.model.lora_attention import GroupedJointAttention
from fdfo.model.text import TRAINING_TEXT_LENGTH, TextEmbeddings, encode_text, text_length

DECODE_BATCH = 8  # images; on a CPU larger batches fall out of its caches and take twice as long


class FlowModel(AdaptedPipeline):
    """What training asks of the base model with its LoRA: text embeddings, velocities, images."""

    compiled_rows: int | None = None  # rows of x for which the blocks are compiled

    # -- memory and speed

    def checkpoint_gradients(self) -> None:
        """Store only the inputs of the transformer's blocks from now on, and recompute each block in the backward pass."""
        self.pipe.transformer.enable_gradient_checkpointing(checkpointing(self.device))

    def accelerate(self, compiled_rows: int | None, resolution: int) -> str | None:
        """Make velocity() and decode() fast for training. After it only they work: weights of several types need autocast.

        compiled_rows: rows of x at a time for which the blocks are compiled; None leaves them eager. Returns why compiling failed,
        or None.
        """
        transformer, vae = self.pipe.transformer, self.pipe.vae
        cast_frozen_weights(transformer, self.compute_type)
        cast_frozen_weights(vae, self.compute_type)
        transformer.set_attn_processor(GroupedJointAttention())
        if compiled_rows is None:
            return None
        self.compiled_rows = compiled_rows
        failure = try_compiled([*transformer.transformer_blocks, vae.decoder], lambda: self._warm_up(resolution))
        if failure is not None:
            self.compiled_rows = None
        return failure

    def _warm_up(self, resolution: int) -> None:
        """Run everything that is compiled once, forward and backward, on zeros."""
        config, x = self.pipe.transformer.config, torch.zeros(1, *self.latent_shape(resolution), device=self.device)
        length = self.pipe.tokenizer_max_length + text_length(self.pipe, TRAINING_TEXT_LENGTH)
        text = TextEmbeddings(
            torch.zeros(1, length, config.joint_attention_dim, device=self.device, dtype=self.dtype),
            torch.zeros(1, config.pooled_projection_dim, device=self.device, dtype=self.dtype),
        )
        self._forward(x, x.new_ones(1), text).float().sum().backward()
        for parameter in self.trainable():
            parameter.grad = None
        self.decode(x)

    # -- text, velocity, images

    def encode(self, prompts: Sequence[str], length: int = TRAINING_TEXT_LENGTH) -> TextEmbeddings:
        """Encode prompts, with `length` T5 tokens, outside autocast -> tokens [N, L, D] and pooled [N, D']."""
        return encode_text(self.pipe, prompts, length, self.device)

    def encode_prompts(self, prompts: Sequence[str], guidance: float) -> tuple[TextEmbeddings, TextEmbeddings | None]:
        """Encode prompts for training, and the empty prompt if guidance needs it, bringing the text encoders to the device."""
        with self.text_encoders_loaded():
            return self.encode(prompts), self.encode([""]) if guidance != 1 else None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.compute_type, enabled=self.precision != "fp32")

    def velocity(
        self, x: torch.Tensor, sigma: torch.Tensor, text: TextEmbeddings, empty: TextEmbeddings | None, guidance: float
    ) -> torch.Tensor:
        """Return v at x [N, C, H, W] and noise levels sigma [N] float32, with guidance (docs/method.md 1) -> [N, C, H, W].

        empty is the encoded empty prompt, one row; it is needed if guidance differs from 1.
        """
        if guidance == 1.0:
            return self._forward(x, sigma, text)
        n = len(x)
        both = TextEmbeddings(
            torch.cat([empty.tokens.expand(n, -1, -1), text.tokens]), torch.cat([empty.pooled.expand(n, -1), text.pooled])
        )
        v_neg, v_pos = self._forward(x.repeat(2, 1, 1, 1), sigma.repeat(2), both).chunk(2)
        return v_neg + guidance * (v_pos - v_neg)

    def velocity_at(
        self, text: TextEmbeddings, empty: TextEmbeddings | None, guidance: float
    ) -> Callable[[torch.Tensor, float], torch.Tensor]:
        """Return velocity(x [N, C, H, W], sigma) -> [N, C, H, W] for these N prompts, as the samplers of the method take it."""

        def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
            return self.velocity(x, torch.full((len(x),), sigma, device=x.device), text, empty, guidance)

        return velocity

    def _forward(self, x: torch.Tensor, sigma: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        """Call the transformer; compiled blocks take batches of one size, so the last batch is padded.

        Compiled sampling runs the training graph and drops what it keeps for a backward pass: a graph of its own would round
        differently, and the ratio at unchanged weights would not be 1.
        """
        if self.compiled_rows is None:
            return self._transformer(x, sigma, text)
        size = self.compiled_rows
        return torch.cat(
            [self._one_batch(x[i : i + size], sigma[i : i + size], text.rows(slice(i, i + size))) for i in range(0, len(x), size)]
        )

    def _one_batch(self, x: torch.Tensor, sigma: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        """Pad at most compiled_rows rows to that number. Outside of training, what a backward pass needs is freed on return."""
        wanted = torch.is_grad_enabled()
        padded = [pad_rows(part, self.compiled_rows) for part in (x, sigma, text.tokens, text.pooled)]
        with torch.enable_grad():
            v = self._transformer(padded[0], padded[1], TextEmbeddings(padded[2], padded[3]))[: len(x)]
        return v if wanted else v.detach()

    def _transformer(self, x: torch.Tensor, sigma: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        with self.autocast(), fast_attention(self.device):
            return self.pipe.transformer(
                hidden_states=x,
                timestep=1000 * sigma,
                encoder_hidden_states=text.tokens,
                pooled_projections=text.pooled,
                return_dict=False,
            )[0]

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents [N, C, H, W] -> images [N, 3, 8 H, 8 W] float32 in [0, 1], DECODE_BATCH at a time."""
        config, images = self.pipe.vae.config, []
        for batch in latents.split(DECODE_BATCH):
            rows = len(batch) if self.compiled_rows is None else DECODE_BATCH
            scaled = pad_rows(batch / config.scaling_factor + config.shift_factor, rows).to(memory_format=torch.channels_last)
            with self.autocast():
                decoded = self.pipe.vae.decode(scaled, return_dict=False)[0][: len(batch)]
            images.append((decoded.float() / 2 + 0.5).clamp(0, 1).contiguous())
        return torch.cat(images)

    def sigmas(self, steps: int) -> torch.Tensor:
        """Return the scheduler's grid for T steps, from 1 to 0 (docs/method.md 1): [T + 1] float32."""
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        return scheduler.sigmas.to(torch.float32)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Return C, H, W of the latents of square images. Raises UserError for a resolution the model cannot draw."""
        step, config = self.pipe.vae_scale_factor * self.pipe.patch_size, self.pipe.transformer.config
        largest = config.pos_embed_max_size * step
        if resolution % step or not 0 < resolution <= largest:
            raise UserError(f"The resolution {resolution} does not fit {self.name}: give a multiple of {step} up to {largest}.")
        size = resolution // self.pipe.vae_scale_factor
        return (config.in_channels, size, size)
