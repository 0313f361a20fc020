"""Scorers of one's own, as --reward-specs own_scorers:NAME=1 loads them; most are broken on purpose."""

import os
import signal
import sys
import time

import torch


class Brightness:
    """A scorer that works: mean brightness, 0 to 100."""

    def __init__(self, device: torch.device):
        self.calls = 0

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return 100 * images.float().mean((1, 2, 3)) / (255 if images.dtype == torch.uint8 else 1)


class Constant(Brightness):
    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        return torch.full((len(prompts),), 7.0)


class NotANumber(Brightness):
    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        return super().score(prompts, images).index_fill(0, torch.tensor([2]), float("nan"))


class FailsLater(Brightness):
    """Works in the first epoch; later one image has no finite score."""

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        scores = super().score(prompts, images)
        return scores if self.calls == 1 else scores.index_fill(0, torch.tensor([2]), float("inf"))


class Interrupted(Brightness):
    """Works; where STOP_RANK says so, the machine asks that process to stop while the second epoch is scored."""

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        scores = super().score(prompts, images)
        if os.environ.get("STOP_RANK") == os.environ.get("RANK", "0") and self.calls == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return scores


class SometimesNotANumber(Brightness):
    """One image in a hundred, the same in every epoch, has no score."""

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        return super().score(prompts, images).index_fill(0, torch.arange(7, len(images), 100), float("nan"))


class NeverAgain(Brightness):
    """Works in the first epoch; later no image has a score, as where the adapter has broken."""

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        scores = super().score(prompts, images)
        return scores if self.calls == 1 else torch.full_like(scores, float("nan"))


class Huge(Brightness):
    """No gradient of it is finite."""

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        return 1e36 * super().score(prompts, images)


class NoConstructor(Brightness):
    def __init__(self):
        self.calls = 0


class NoScore:
    def __init__(self, device: torch.device):
        pass


class Paints(Brightness):
    """Writes into the images, where PyTorch does not see it."""

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        scores = super().score(prompts, images)
        images.numpy()[:] = 0
        prompts.clear()
        return scores


class TurnsGradientsOff(Brightness):
    """Leaves the process with settings of its own."""

    description = 7

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        return super().score(prompts, images)


class Exits(Brightness):
    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        sys.exit(0)


class FailsOnce(Brightness):
    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        scores = super().score(prompts, images)
        if self.calls == 2:
            raise ConnectionError("the judge hung up")
        return scores


class FailsFromThen(Brightness):
    """Works in the first epoch, then never."""

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        scores = super().score(prompts, images)
        if self.calls > 1:
            raise ConnectionError("the judge hung up")
        return scores


class Hangs(Brightness):
    """Does not come back from the second epoch, on rank 1."""

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        if self.calls == 1 and os.environ.get("RANK") == "1":
            time.sleep(3600)
        return super().score(prompts, images)


class Dies(Brightness):
    """Kills the process of rank 1 in the second epoch."""

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        if self.calls == 1 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(prompts, images)


class ConstantLater(Brightness):
    """Works in the first epoch; later all images are worth the same."""

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        scores = super().score(prompts, images)
        return scores if self.calls == 1 else torch.full_like(scores, 7.0)


class Redness(Brightness):
    """Another scorer that works: more red than blue."""

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        return images.float()[:, 0].mean((1, 2)) - images.float()[:, 2].mean((1, 2))


class RednessInThousandths(Redness):
    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        return 1000 * super().score(prompts, images)
