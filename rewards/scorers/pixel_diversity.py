"""pixel_diversity: how different the images of one prompt are, pixel by pixel. No model: the tiny preset's diversity."""

import torch


class PixelDiversity:
    """Per prompt, the mean over its image pairs of the root mean square difference of their pixels, in percent: 0 to 100."""

    description = "root mean square pixel difference of a prompt's image pairs, in percent"

    def score_sets(self, images: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Score images [N, 3, H, W] uint8; the counts[k] images of prompt k lie together -> [P] float32; NaN for a single image."""
        sets = (images.float() / 255).flatten(1).split(counts)  # P times [n, 3 H W]
        return torch.stack([100 * torch.pdist(rows).mean() / rows.shape[1] ** 0.5 for rows in sets])
