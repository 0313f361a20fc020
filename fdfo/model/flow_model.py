"""The text-to-image flow model: text embeddings, velocities and images of an adapted pipeline (docs/method.md 1 and 4)."""

import contextlib
from collections.abc import Callable, Sequence

import torch

from fdfo.config.errors import UserError
from fdfo.distributed.job import Job
from fdfo.distributed.sharding import Lockstep, shard_blocks
from fdfo.model.acceleration import cast_frozen_weights, checkpointing, fast_attention, pad_rows, try_compiled
from fdfo.model.adapted_pipeline import AdaptedPipeline
from fdfo.model.text import TextEmbeddings, joined

TRIAL_TEXT = 256  # tokens of a long text in a trial, where their number differs between prompts
DECODE_BATCH = 8  # images; on a CPU larger batches fall out of its caches and take twice as long


class FlowModel(AdaptedPipeline):
    """What training asks of the base model with its LoRA: text embeddings, velocities, images."""

    compiled_rows: int | None = None  # rows of x for which the blocks are compiled
    lockstep: Lockstep | None = None  # if the transformer is spread over the job

    # -- memory and speed

    def checkpoint_gradients(self) -> None:
        """Store only the inputs of the transformer's blocks from now on, and recompute each block in the backward pass."""
        self.pipe.transformer.enable_gradient_checkpointing(checkpointing(self.device))

    def shard(self, job: Job) -> None:
        """Spread the transformer's blocks over the job, before to_device(); they are recomputed in the backward, and never compiled."""
        self._fast_weights()
        self.checkpoint_gradients()
        shard_blocks(self.pipe.transformer, self.family.blocks())
        self.lockstep = Lockstep(job)

    def together(self) -> contextlib.AbstractContextManager:
        """Return the context inside which processes may call velocity() unequally often."""
        return contextlib.nullcontext() if self.lockstep is None else self.lockstep.together()

    def _fast_weights(self) -> None:
        for part in (self.pipe.transformer, self.pipe.vae):
            cast_frozen_weights(part, self.compute_type)
        self.family.speed_up_attention()

    def accelerate(self, compiled_rows: int | None, resolution: int) -> str | None:
        """Make velocity() and decode() fast for training. After it only they work: weights of several types need autocast.

        compiled_rows: rows of x at a time for which the blocks are compiled; None leaves them eager. Returns why compiling failed,
        or None.
        """
        if self.lockstep is not None:
            return None
        self._fast_weights()
        if compiled_rows is None:
            return None
        self.compiled_rows = compiled_rows
        blocks = [(block, self.family.dynamic_text) for block in self.family.blocks()]
        failure = try_compiled([*blocks, (self.pipe.vae.decoder, False)], lambda: self._warm_up(resolution))
        if failure is not None:
            self.compiled_rows = None
        return failure

    def _warm_up(self, resolution: int) -> None:
        """Run everything that is compiled once, forward and backward, on zeros."""
        text, x = self.encode_prompts([""], 1.0)[0], torch.zeros(1, *self.latent_shape(resolution), device=self.device)
        self._forward(x, x.new_ones(1), text).float().sum().backward()
        if self.family.dynamic_text:  # a batch of unlike lengths has a mask, and so a graph of its own
            unlike = joined([text, self.long_text(text)])
            self._forward(x.repeat(2, 1, 1, 1), x.new_ones(2), unlike).float().sum().backward()
        for parameter in self.trainable():
            parameter.grad = None
        self.decode(x)

    # -- text, velocity, images

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], length: int | None = None) -> TextEmbeddings:
        """Encode prompts outside autocast, with the text length of training unless another is given -> N rows.

        A GPU's kernels round differently for other numbers of rows. So on a GPU a batch is filled up with the empty prompt, and a
        prompt's embedding does not depend on how many others this process has.
        """
        family, size, parts = self.family, self.family.text_batch, []
        length = family.text_length(length or family.training_text)
        for i in range(0, len(prompts), size):
            batch = list(prompts[i : i + size])
            filler = [""] * (size - len(batch)) if self.device.type == "cuda" else []
            parts.append(family.encode(batch + filler, length, self.device).rows(slice(len(batch))))
        return joined(parts)

    def encode_prompts(self, prompts: Sequence[str], guidance: float) -> tuple[TextEmbeddings, TextEmbeddings | None]:
        """Encode prompts for training, and the empty prompt if guidance needs it, bringing the text encoders to the device."""
        with self.text_encoders_loaded():
            return self.encode(prompts), self.encode([""]) if guidance != 1 else None

    def long_text(self, text: TextEmbeddings) -> TextEmbeddings:
        """Return one row of text with as many tokens as a long prompt has, for a trial."""
        return text.lengthened(self.family.text_length(TRIAL_TEXT))

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
        both = joined([empty.repeated(len(x)), text])
        v_neg, v_pos = self._forward(x.repeat(2, 1, 1, 1), sigma.repeat(2), both).chunk(2)
        return self.family.guided(v_neg, v_pos, guidance)

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
        rows = self.compiled_rows
        with torch.enable_grad():
            v = self._transformer(pad_rows(x, rows), pad_rows(sigma, rows), text.filled_up(rows))[: len(x)]
        return v if wanted else v.detach()

    def _transformer(self, x: torch.Tensor, sigma: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        if self.lockstep is not None:
            self.lockstep.announce(lambda: self._call(x[:1], sigma[:1], text.rows(slice(1))))
        return self._call(x, sigma, text)

    def _call(self, x: torch.Tensor, sigma: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        with self.autocast(), fast_attention(self.device):
            return self.family.velocity(x, sigma, text)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents [N, C, H, W] -> images [N, 3, height, width] float32 in [0, 1], DECODE_BATCH at a time."""
        images = []
        for batch in latents.split(DECODE_BATCH):
            rows = len(batch) if self.compiled_rows is None else DECODE_BATCH
            scaled = pad_rows(self.family.to_vae(batch), rows).to(memory_format=torch.channels_last)
            with self.autocast():
                decoded = self.pipe.vae.decode(scaled, return_dict=False)[0][: len(batch)]
            images.append((decoded.float() / 2 + 0.5).clamp(0, 1).contiguous())
        return torch.cat(images)

    def sigmas(self, steps: int, resolution: int) -> torch.Tensor:
        """Return the grid for T steps at a resolution, from 1 to 0 (docs/method.md 1): [T + 1] float32."""
        return self.family.sigmas(steps, resolution)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Return C, H, W of the latents of square images. Raises UserError for a resolution the model cannot draw."""
        sides = self.family.sides()
        if resolution not in sides:
            raise UserError(
                f"The resolution {resolution} does not fit {self.name}: give a multiple of {sides.step} up to {sides[-1]}."
            )
        return self.family.latent_shape(resolution)
