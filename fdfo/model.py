"""The text-to-image flow model: a frozen StableDiffusion3Pipeline with a LoRA on its transformer (METHOD.md 1 and 4)."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict

from fdfo.acceleration import PinnedWeights, cast_frozen_weights, checkpointing, fast_attention, pad_rows, try_compiled
from fdfo.adapter import attach_lora, fill_lora, lora_targets, read_adapter_config
from fdfo.config import UserError
from fdfo.distributed import check_device
from fdfo.hub import load_pipeline
from fdfo.lora_attention import GroupedJointAttention
from fdfo.text import TRAINING_TEXT_LENGTH, TextEmbeddings, encode_text, text_length

COMPUTE_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
DECODE_BATCH = 8  # pictures; on a CPU larger batches fall out of its caches and take twice as long


def quantised(images: torch.Tensor) -> torch.Tensor:
    """Pictures in [0, 1] as files and evaluations have them: uint8 on the CPU, of the same shape."""
    return (255 * images.float()).round().clamp(0, 255).to(torch.uint8).cpu()


def finite_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Which of [N, ...] are finite throughout: [N] bool."""
    return tensor.isfinite().flatten(1).all(1)


class FlowModel:
    """The pipeline on one device, its LoRA, and the three things that training asks of it: text, velocity, pictures."""

    def __init__(self, name: str, precision: str, device: torch.device):
        """Loads the pipeline from a hub id or a folder, frozen: float32 for precision fp32, else bfloat16 (METHOD.md 4).

        Raises UserError when it cannot be had, or when a half precision is asked for without a GPU.
        """
        check_device(precision, device)
        self.name, self.precision, self.device = name, precision, device
        self.compute_type = COMPUTE_TYPES[precision]
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.pipe = load_pipeline(name, self.dtype)
        self.pipe.set_progress_bar_config(disable=True)
        for module in self._modules():
            module.requires_grad_(False).eval()
        self.pipe.vae.to(memory_format=torch.channels_last)
        self.peft = None
        self.compiled_rows: int | None = None  # rows of x for which the blocks are compiled
        self.waiting_text: PinnedWeights | None = None
        self.resolution_step = self.pipe.vae_scale_factor * self.pipe.patch_size

    def _modules(self) -> list[torch.nn.Module]:
        return [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]

    # -- adapter

    def add_lora(self, rank: int, alpha: int, seed: int) -> None:
        """A fresh float32 LoRA (METHOD.md 4): Gaussian A from the seed, B = 0."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            targets = lora_targets(self.pipe.transformer)
            config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)
            self.peft = attach_lora(self.pipe.transformer, config, self.name)

    def load_adapter(self, folder: Path) -> None:
        """The PEFT adapter that lies in a folder, in place of any other. Raises UserError if it does not fit this transformer."""
        config = read_adapter_config(folder)
        self.remove_adapter()
        self.peft = attach_lora(self.pipe.transformer, config, self.name)
        fill_lora(self.peft, folder, self.name)

    def remove_adapter(self) -> None:
        """Back to the base model."""
        if self.peft is not None:
            self.pipe.transformer, self.peft = self.peft.unload(), None

    def trainable(self) -> list[torch.nn.Parameter]:
        """The LoRA's parameters, in a fixed order."""
        return [parameter for _, parameter in self.named_trainable()]

    def named_trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.pipe.transformer.named_parameters() if "lora_" in name]

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors on the CPU, under the names of a PEFT adapter file."""
        state = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """The adapter is off inside."""
        if self.peft is None:
            yield
        else:
            with self.peft.disable_adapter():
                yield

    # -- devices

    def to_device(self, text_encoders: bool = True) -> None:
        """Everything on the device; the text encoders in pinned host memory, when there is a GPU and they are not wanted on it."""
        self.waiting_text = None
        stay = [] if text_encoders or self.device.type == "cpu" else self._text_encoders()
        for module in self._modules():
            if module not in stay:
                module.to(self.device)
        if stay:
            self.waiting_text = PinnedWeights(stay, self.device)

    def _text_encoders(self) -> list[torch.nn.Module]:
        return [self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.text_encoder_3]

    @contextlib.contextmanager
    def text_encoders_loaded(self) -> Iterator[None]:
        """The text encoders are on the device inside."""
        with contextlib.nullcontext() if self.waiting_text is None else self.waiting_text.loaded():
            yield

    def drop_text_encoders(self) -> None:
        """Frees their memory once every prompt is encoded."""
        self.pipe.register_modules(text_encoder=None, text_encoder_2=None, text_encoder_3=None)

    # -- memory and speed

    def checkpoint_gradients(self) -> None:
        """From now on a forward keeps the inputs of the transformer's blocks alone, and the backward computes each block again."""
        self.pipe.transformer.enable_gradient_checkpointing(checkpointing(self.device))

    def accelerate(self, compiled_rows: int | None, resolution: int) -> str | None:
        """Makes velocity() and decode() fast for training. The pipeline itself draws nothing more, since weights of several types need autocast.

        compiled_rows: rows of x at a time for which the blocks are compiled; None leaves them eager. Returns why nothing
        could be compiled, or None.
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
        """Runs everything that is compiled once, forward and backward, on zeros."""
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

    # -- text, velocity, pictures

    def encode(self, prompts: Sequence[str], length: int = TRAINING_TEXT_LENGTH) -> TextEmbeddings:
        """Text embeddings of prompts, with that many T5 tokens: tokens [N, L, D] and pooled [N, D'], outside autocast."""
        return encode_text(self.pipe, prompts, length, self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.compute_type, enabled=self.precision != "fp32")

    def velocity(
        self, x: torch.Tensor, sigma: torch.Tensor, text: TextEmbeddings, empty: TextEmbeddings | None, guidance: float
    ) -> torch.Tensor:
        """v at x [N, C, H, W] and noise levels sigma [N] float32, with guidance (METHOD.md 1) -> [N, C, H, W].

        empty is the encoded empty prompt, one row; it is needed where guidance differs from 1.
        """
        if guidance == 1.0:
            return self._forward(x, sigma, text)
        n = len(x)
        both = TextEmbeddings(
            torch.cat([empty.tokens.expand(n, -1, -1), text.tokens]), torch.cat([empty.pooled.expand(n, -1), text.pooled])
        )
        v_neg, v_pos = self._forward(x.repeat(2, 1, 1, 1), sigma.repeat(2), both).chunk(2)
        return v_neg + guidance * (v_pos - v_neg)

    def _forward(self, x: torch.Tensor, sigma: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        """One transformer call; where the blocks are compiled, as many as there are batches of that size, the last one padded.

        Compiled sampling runs the training graph and drops what it keeps for a backward: a graph of its own would round
        differently, and the ratio at unchanged weights would not be 1.
        """
        if self.compiled_rows is None:
            return self._transformer(x, sigma, text)
        size = self.compiled_rows
        return torch.cat(
            [self._one_batch(x[i : i + size], sigma[i : i + size], text.rows(slice(i, i + size))) for i in range(0, len(x), size)]
        )

    def _one_batch(self, x: torch.Tensor, sigma: torch.Tensor, text: TextEmbeddings) -> torch.Tensor:
        """At most compiled_rows rows, padded to that number. Outside of training, what a backward would need is freed on return."""
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
        """Latents [N, C, H, W] -> images [N, 3, 8 H, 8 W] float32 in [0, 1], DECODE_BATCH at a time."""
        config, images = self.pipe.vae.config, []
        for batch in latents.split(DECODE_BATCH):
            rows = len(batch) if self.compiled_rows is None else DECODE_BATCH
            scaled = pad_rows(batch / config.scaling_factor + config.shift_factor, rows).to(memory_format=torch.channels_last)
            with self.autocast():
                decoded = self.pipe.vae.decode(scaled, return_dict=False)[0][: len(batch)]
            images.append((decoded.float() / 2 + 0.5).clamp(0, 1).contiguous())
        return torch.cat(images)

    def sigmas(self, steps: int) -> torch.Tensor:
        """The scheduler's grid for that many steps, from 1 to 0 (METHOD.md 1): [T + 1] float32."""
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        return scheduler.sigmas.to(torch.float32)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """C, H, W of the latents of square pictures. Raises UserError for a resolution the model cannot draw."""
        step, config = self.resolution_step, self.pipe.transformer.config
        largest = config.pos_embed_max_size * step
        if resolution % step or not 0 < resolution <= largest:
            raise UserError(f"The resolution {resolution} does not fit {self.name}: give a multiple of {step} up to {largest}.")
        size = resolution // self.pipe.vae_scale_factor
        return (config.in_channels, size, size)
