"""Fills a hub cache with random weights of the true sizes under the true names, so that every command runs at full size as written.

python benchmarks/random_hub.py --out /tmp/random_hub
export HF_HOME=/tmp/random_hub TORCH_HOME=/tmp/random_hub/torch HF_HUB_OFFLINE=1
python train.py --prompt-set showcase --num-epochs 1 --total-pairs-per-epoch 12
python metrics.py --prompt-set showcase --num-prompts 15 --num-repeats 2 --metrics pickscore vlm_alignment dreamsim_diversity

Tokenizers are small ones of the right classes and lengths. The whole is about 40 GB. Other base models, of 16, 21 and 28 GB:

python benchmarks/random_hub.py --parts flux2-klein z-image sd35-large pickscore --out /tmp/random_hub
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bases  # noqa: E402
from tiny_qwen import save_processor, token_ids  # noqa: E402

from fdfo.config.train_options import KLEIN_4B, SD35_LARGE, SD35_MEDIUM, Z_IMAGE  # noqa: E402
from fdfo.tiny.architecture import build_clip_tokenizer, build_t5_tokenizer  # noqa: E402
from rewards.scorers.clip import CLIP_MODELS  # noqa: E402
from rewards.vlm.judge import VLM_MODELS  # noqa: E402

COMMIT = "0" * 40
CLIP_L_TEXT = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
CLIP_G_TEXT = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280, hidden_act="gelu"
)
CLIP_H_TEXT = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu")
CLIP_L_VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
CLIP_H_VISION = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14, hidden_act="gelu"
)
TOKENS = dict(vocab_size=49408, max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1)


@dataclass(frozen=True)
class HubConfig:
    """Make a hub cache of full-size models with random weights."""

    out: Path
    """folder to fill: HF_HOME of the commands that use it"""
    parts: tuple[Literal["sd35", "clip", "vlm", "dreamsim", "pickscore", "sd35-large", "flux2-klein", "z-image"], ...] = (
        "sd35", "clip", "vlm", "dreamsim",
    )  # fmt: skip
    """what to make; pickscore is two of the four models of clip: its own, and the one with its processor"""
    t5_layers: int = 24
    """layers of the T5 encoder; fewer make the folder smaller"""
    vlm: Literal["qwenvl-3b", "qwenvl-7b"] = "qwenvl-7b"
    """size of the VLM judge"""
    seed: int = 0
    """seed of the weights"""


MEDIUM = dict(
    num_layers=24,
    num_attention_heads=24,
    caption_projection_dim=1536,
    pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)),
)
LARGE = dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192)


def save_sd35(folder: Path, size: dict, t5_layers: int) -> None:
    """Save a StableDiffusion3Pipeline of the shapes of SD3.5 Medium or Large, bfloat16."""
    clip, t5 = build_clip_tokenizer(), build_t5_tokenizer()
    clip.model_max_length, t5.model_max_length = 77, 512
    xxl = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=t5_layers, num_heads=64, feed_forward_proj="gated-gelu"
    )
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64, joint_attention_dim=4096,
            pooled_projection_dim=2048, qk_norm="rms_norm", **size,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, sample_size=1024,
            scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_L_TEXT, **TOKENS)),
        tokenizer=clip,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G_TEXT, **TOKENS)),
        tokenizer_2=clip,
        text_encoder_3=T5EncoderModel(xxl),
        tokenizer_3=t5,
    ).to(torch.bfloat16).save_pretrained(folder)  # fmt: skip


def save_bfloat16(pipe: DiffusionPipeline, folder: Path) -> None:
    pipe.to(torch.bfloat16).save_pretrained(folder)


def save_clip(folder: Path, text: dict, vision: dict, projection: int) -> None:
    """Save a CLIPModel with its processor; stored in bfloat16, the scorer computes in float32."""
    tokenizer = build_clip_tokenizer()
    tokenizer.model_max_length = 77
    text = {name: value for name, value in text.items() if name != "projection_dim"}
    CLIPModel(CLIPConfig(text_config=text | TOKENS, vision_config=vision, projection_dim=projection)).save_pretrained(folder)
    CLIPProcessor(image_processor=CLIPImageProcessor(), tokenizer=tokenizer).save_pretrained(folder)


def save_vlm(folder: Path, size: str) -> None:
    """Save a Qwen2.5-VL of 3 or 7 billion parameters with its processor, bfloat16."""
    hidden, inner, layers, heads, groups = (3584, 18944, 28, 28, 4) if size == "qwenvl-7b" else (2048, 11008, 36, 16, 2)
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
    text = dict(
        vocab_size=152064, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, max_position_embeddings=32768, rope_parameters=rope, rope_scaling=rope,
    )  # fmt: skip
    vision = dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=hidden, window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
    )  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=size == "qwenvl-3b", **token_ids())
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    save_processor(folder)


def main(config: HubConfig) -> None:
    torch.manual_seed(config.seed)
    torch.set_default_dtype(torch.bfloat16)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def put(name: str, save: Callable[[Path], None]) -> None:
        start, repository = time.perf_counter(), config.out / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        with device:
            save(repository / "snapshots" / COMMIT)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)

    if "sd35" in config.parts:
        put(SD35_MEDIUM, lambda folder: save_sd35(folder, MEDIUM, config.t5_layers))
    if "sd35-large" in config.parts:
        put(SD35_LARGE, lambda folder: save_sd35(folder, LARGE, config.t5_layers))
    if "flux2-klein" in config.parts:
        put(KLEIN_4B, lambda folder: save_bfloat16(bases.build_klein(bases.KLEIN_4B, bases.QWEN3_4B, bases.KLEIN_VAE), folder))
    if "z-image" in config.parts:
        put(Z_IMAGE, lambda folder: save_bfloat16(bases.build_z_image(bases.Z_IMAGE, bases.QWEN3_4B, bases.FLUX_VAE), folder))
    if "clip" in config.parts:
        put(CLIP_MODELS["clip_l14"][0], lambda folder: save_clip(folder, CLIP_L_TEXT, CLIP_L_VISION, 768))
    of_pickscore = ("clip_h14", "pickscore") if "pickscore" in config.parts else ()
    for name in ("clip_h14", "pickscore", "hpsv2") if "clip" in config.parts else of_pickscore:
        put(CLIP_MODELS[name][0], lambda folder: save_clip(folder, CLIP_H_TEXT, CLIP_H_VISION, 1024))
    if "vlm" in config.parts:
        put(VLM_MODELS[config.vlm], lambda folder: save_vlm(folder, config.vlm))
    if "dreamsim" in config.parts:
        from tiny_dreamsim import save_dreamsim  # imports a package of its own that the other parts do without

        torch.set_default_dtype(torch.float32)
        save_dreamsim(config.out / "torch" / "hub" / "dreamsim", width=768, heads=12)


if __name__ == "__main__":
    main(tyro.cli(HubConfig))
