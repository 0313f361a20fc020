"""Writes a StableDiffusion3Pipeline of SD3.5 Medium's exact shapes with random weights, to run at full size without them.

python benchmarks/random_sd35.py --out /tmp/random_sd35
python train.py --pretrained-model /tmp/random_sd35 --prompt-set showcase --num-epochs 1 --total-pairs-per-epoch 12
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from fdfo.tiny.architecture import build_clip_tokenizer, build_t5_tokenizer  # noqa: E402


@dataclass(frozen=True)
class RandomConfig:
    """Make a full-size pipeline with random weights."""

    out: Path
    """folder to write"""
    t5_layers: int = 24
    """layers of the T5 encoder; fewer make the folder smaller"""
    seed: int = 0
    """seed of the weights"""


def main(config: RandomConfig) -> None:
    torch.manual_seed(config.seed)
    torch.set_default_dtype(torch.bfloat16)
    clip, t5 = build_clip_tokenizer(), build_t5_tokenizer()
    clip.model_max_length, t5.model_max_length = 77, 512
    text = dict(vocab_size=49408, max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    clip_l = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768, **text
    )
    clip_g = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
        **text,
    )
    xxl = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=config.t5_layers,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        pipe = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
                num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
                pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, sample_size=1024,
                scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
            ),
            text_encoder=CLIPTextModelWithProjection(clip_l),
            tokenizer=clip,
            text_encoder_2=CLIPTextModelWithProjection(clip_g),
            tokenizer_2=clip,
            text_encoder_3=T5EncoderModel(xxl),
            tokenizer_3=t5,
        )  # fmt: skip
    pipe.to(torch.bfloat16).save_pretrained(config.out)
    print(f"written: {config.out}")


if __name__ == "__main__":
    main(tyro.cli(RandomConfig))
