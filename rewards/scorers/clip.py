"""The CLIP family (docs/method.md 5): pickscore, hpsv2, clip_h14, clip_l14, and the tiny preset's scene_clip. One class."""

import torch
from transformers import CLIPModel, CLIPProcessor

from fdfo.storage.hub import hub_errors
from fdfo.tiny import SCENE_CLIP

CLIP_MODELS = {  # name: (model, processor), hub ids or folders
    "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "hpsv2": ("adams-story/HPSv2-hf", "adams-story/HPSv2-hf"),
    "clip_h14": ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "clip_l14": ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14"),
    "scene_clip": (str(SCENE_CLIP), str(SCENE_CLIP)),
}
PUBLISHED_PROCESSORS = {"pickscore": "yuvalkirstain/PickScore_v1"}  # of the published figures of metrics, where it differs
MAX_BATCH = 64


class ClipScorer:
    """exp(logit_scale) cos(text, image) of a CLIPModel in float32; text is cut at the model's length."""

    def __init__(self, model: str, processor: str, device: str | torch.device = "cpu"):
        """model, processor: hub ids or folders. Raises UserError if they cannot be loaded."""
        self.device, self.description = torch.device(device), f"CLIP logit of {model}, processor {processor}"
        with hub_errors(model):
            self.model = CLIPModel.from_pretrained(model, dtype=torch.float32).requires_grad_(False).eval().to(device)
        with hub_errors(processor):
            self.processor = CLIPProcessor.from_pretrained(processor)

    @torch.no_grad()
    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        """Score prompts [N], images [N, 3, H, W] float in [0, 1] or uint8 -> [N] float32. Floats are not quantised."""
        chunks = [
            self._score_batch(prompts[i : i + MAX_BATCH], images[i : i + MAX_BATCH]) for i in range(0, len(prompts), MAX_BATCH)
        ]
        return torch.cat(chunks)

    def _score_batch(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        length = self.model.config.text_config.max_position_embeddings
        text = self.processor.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        rescale = images.dtype == torch.uint8
        pixels = self.processor.image_processor(list(images.to(self.device)), do_rescale=rescale, return_tensors="pt")
        image_features = embedding(self.model.get_image_features(stacked(pixels["pixel_values"]).to(self.device)))
        text_features = embedding(self.model.get_text_features(**text.to(self.device)))
        cosine = torch.nn.functional.cosine_similarity(text_features, image_features)
        return self.model.logit_scale.exp() * cosine


def stacked(pixels: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """Stack the pixel values of an image processor, which some transformers versions return as a list -> [N, 3, H, W]."""
    return torch.stack(list(pixels)) if isinstance(pixels, list) else pixels


def embedding(output: object) -> torch.Tensor:
    """Return the projected features, which transformers 5 wraps into an output object -> [N, D]."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
