"""A cache folder as the dreamsim package leaves it after its downloads, with random weights: its own classes load from it."""

from pathlib import Path

import torch
from dreamsim.config import dreamsim_args
from dreamsim.feature_extraction.vision_transformer import DINOHead, VisionTransformer
from dreamsim.model import PerceptualModel
from peft import LoraConfig, get_peft_model

HUBCONF = """dependencies = ["torch"]


def dino_vitb16(pretrained=True):
    import torch
    from dreamsim.feature_extraction.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(patch_size=16, embed_dim={width}, num_heads={heads}, qkv_bias=True)
"""


def small_vit(patch_size: int, width: int = 48, heads: int = 3) -> VisionTransformer:
    """In place of the package's vit_base, which has width 768 and 12 heads."""
    return VisionTransformer(patch_size=patch_size, embed_dim=width, num_heads=heads, qkv_bias=True)


def save_dreamsim(folder: Path, width: int = 48, heads: int = 3) -> Path:
    """Writes torch.hub's copy of DINO's code, the three ViTs and the LoRA of the ensemble; returns the folder.

    The package must build ViTs of the same width: see small_vit.
    """
    code = folder / "facebookresearch_dino_main"
    code.mkdir(parents=True)
    (code / "hubconf.py").write_text(HUBCONF.format(width=width, heads=heads))
    torch.manual_seed(0)
    head = {f"module.head.{name}": tensor for name, tensor in DINOHead(768, 2048).state_dict().items()}
    head["module.head.last_layer.weight"] = torch.randn(2048, 256)
    torch.save({"student": head}, folder / "dino_vitb16_pretrain.pth")
    for name in ("clip", "open_clip"):
        vit = small_vit(16, width, heads)
        vit.pos_drop = torch.nn.LayerNorm(width)
        torch.save(
            {"state_dict": vit.state_dict() | {"proj": torch.randn(width, 512)}}, folder / f"{name}_vitb16_pretrain.pth.tar"
        )
    hub_folder = torch.hub.get_dir()
    plain = PerceptualModel(
        **dreamsim_args["model_config"]["ensemble"], device="cpu", load_dir=str(folder), normalize_embeds=True
    )
    torch.hub.set_dir(hub_folder)  # which the package moves
    lora = get_peft_model(plain, LoraConfig(r=4, lora_alpha=4, target_modules=["qkv"], init_lora_weights=False))
    lora.save_pretrained(str(folder / "ensemble_lora"))
    return folder
