"""Random pipelines of the families beside SD3, of any size: small ones for the tests, and true sizes for the benchmarks."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_qwen import build_tokenizer
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
NO_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
# The true sizes, from the models' config.json.
KLEIN_4B = dict(num_layers=5, num_single_layers=20, num_attention_heads=24, attention_head_dim=128, joint_attention_dim=7680)
KLEIN_9B = dict(num_layers=8, num_single_layers=24, num_attention_heads=32, attention_head_dim=128, joint_attention_dim=12288)
Z_IMAGE = dict(
    dim=3840, n_layers=30, n_refiner_layers=2, n_heads=30, n_kv_heads=30, cap_feat_dim=2560, axes_lens=[1536, 512, 512]
)
QWEN3_4B = dict(
    vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True,
)  # fmt: skip
FLUX_VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, sample_size=1024)
KLEIN_VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=32)


def build_text_tokenizer(length: int) -> Qwen2Tokenizer:
    """Byte-level tokens, with a chat template like Qwen3's."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template, tokenizer.model_max_length = CHAT_TEMPLATE, length
    return tokenizer


def build_klein(transformer: dict, text: dict, vae: dict, text_tokens: int = 512, distilled: bool = False) -> Flux2KleinPipeline:
    decoder = AutoencoderKLFlux2(**BLOCKS, **vae)
    with torch.no_grad():  # which are 0 and 1 otherwise
        decoder.bn.running_mean.normal_(0, 0.1)
        decoder.bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(in_channels=4 * decoder.config.latent_channels, guidance_embeds=False, **transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=decoder,
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**text)),
        tokenizer=build_text_tokenizer(text_tokens),
        is_distilled=distilled,
    )


def build_z_image(transformer: dict, text: dict, vae: dict, text_tokens: int = 512, shift: float = 6.0) -> ZImagePipeline:
    network = ZImageTransformer2DModel(**transformer)
    with torch.no_grad():  # 0 otherwise
        for token in (network.x_pad_token, network.cap_pad_token):
            token.normal_(0, 1)
    return ZImagePipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=AutoencoderKL(**BLOCKS, **NO_QUANT, **vae, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(Qwen3Config(**text)),
        tokenizer=build_text_tokenizer(text_tokens),
    )


def tiny_text(layers: int) -> dict:
    return dict(
        vocab_size=len(build_tokenizer()), hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip


TINY_VAE = dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
TINY_TOKENS = 112  # of text: the longest caption of the tests has about 100 letters


def tiny_klein(**changes) -> Flux2KleinPipeline:
    network = dict(
        num_layers=2, num_single_layers=2, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return build_klein(network, tiny_text(28), TINY_VAE | {"latent_channels": 4}, TINY_TOKENS, **changes)


def tiny_z_image(**changes) -> ZImagePipeline:
    network = dict(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6],
        axes_lens=[256, 16, 16],
    )  # fmt: skip
    return build_z_image(network, tiny_text(3), TINY_VAE | {"latent_channels": 4}, TINY_TOKENS, **changes)


def save(pipe: DiffusionPipeline, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    return folder
