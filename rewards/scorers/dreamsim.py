"""dreamsim_diversity (docs/method.md 5): how different the images of one prompt are, by the DreamSim ensemble."""

import pickle
import zipfile
from pathlib import Path

import torch
from dreamsim import dreamsim
from PIL import Image

from fdfo.config.errors import UserError
from fdfo.distributed.job import Job

CACHE = Path(torch.hub.get_dir()) / "dreamsim"  # read here, since the package moves torch.hub's folder
MAX_BATCH = 64


class DreamSimDiversity:
    """Per prompt, the mean over its image pairs of the squared L2 distance between `model.embed` outputs: 0 to 4."""

    description = "DreamSim ensemble, mean squared distance of a prompt's image pairs"

    def __init__(self, job: Job):
        """Load on rank 0 first, so that the weights and torch.hub's code of DINO are downloaded once. Raises UserError."""
        self.device = job.device
        job.on_main(self._load)
        if not job.is_main:
            self._load()

    def _load(self) -> None:
        CACHE.mkdir(parents=True, exist_ok=True)
        hub_folder = torch.hub.get_dir()
        try:
            self.model, self.preprocess = dreamsim(pretrained=True, device=str(self.device), cache_dir=str(CACHE))
        except (OSError, RuntimeError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise UserError(
                f"DreamSim cannot be loaded ({str(error)[:200]}): check the network, or delete {CACHE} if a download broke off."
            ) from error
        finally:
            torch.hub.set_dir(hub_folder)

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images [N, 3, H, W] uint8 -> [N, D] float32, through the package's own preprocessing."""
        rows = []
        for batch in images.split(MAX_BATCH):
            pixels = [self.preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in batch.cpu()]
            rows.append(self.model.embed(torch.cat(pixels).to(self.device)))
        return torch.cat(rows)

    def score_sets(self, images: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Score images [N, 3, H, W] uint8; the counts[k] images of prompt k lie together -> [P] float32; NaN for a single image."""
        return mean_pair_distances(self.embed(images), counts)


def mean_pair_distances(embeddings: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Return the mean over pairs of rows of the squared L2 distance, set by set: embeddings [N, D], counts [P] -> [P]."""
    return torch.stack([torch.pdist(rows.float()).square().mean() for rows in embeddings.split(counts)])
