"""What a judge of pairs is, and how it becomes part of the reward (docs/method.md 3).

Only the difference of a pair's rewards counts, so a judge that says which of two images is better, and by how much, is a reward.
Inside the reward its value v becomes the scores v / 2 and -v / 2 of the two images: R1 - R2 = v, and all that follows is the same for
scorers and judges.
"""

from typing import Protocol

import torch

from fdfo.config.errors import UserError
from rewards.scorer import check_one_number_each


class PairJudge(Protocol):
    """Compares the two images of a pair. It may have `check_prompts`, `description` and `model`, as a scorer may."""

    def compare(self, prompts: list[str], first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """prompts [P]; first, second [P, 3, H, W] float in [0, 1] -> [P] in [-1, 1].

        1: the first image is better by all means; 0: a tie; -1: the second; NaN: not judged, so that the pair is dropped.
        """
        ...


class PairScores:
    """A judge of pairs as a scorer of images that lie pair by pair. All but its scores is the judge's own."""

    def __init__(self, name: str, judge: PairJudge):
        self.name, self.judge = name, judge

    def __getattr__(self, attribute: str) -> object:
        return getattr(self.judge, attribute)

    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        """prompts [2P], images [2P, 3, H, W], rows 2k and 2k + 1 a pair -> [2P] float32: half a pair's value, and minus that.

        Raises UserError if the judge breaks its contract.
        """
        values = self.judge.compare(prompts[::2], images[::2], images[1::2])
        check_one_number_each(f"judge {self.name}", values, len(prompts) // 2, "pairs")
        half = values.float() / 2  # [P]
        if (wrong := values[half.abs() > 0.5]).numel():
            raise UserError(
                f"The judge {self.name} gave a pair the value {float(wrong[0]):g}: return numbers from -1 to 1, or NaN for a pair "
                "that is not judged."
            )
        return torch.stack([half, -half], dim=1).flatten()
