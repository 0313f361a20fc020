"""`vlm_pair`: Qwen2.5-VL sees both images of a pair and says which matches the caption better."""

import torch

from rewards.vlm.judge import MAX_BATCH, TRAINING_SIZE, Vlm, training_images

QUESTION = 'Which image matches the caption "{prompt}" better? Answer A for the first image or B for the second.'
MAX_PAIRS = MAX_BATCH // 4  # two orders of two images each


class VlmPairJudge:
    """p(A | first, second) - p(A | second, first), with p(A) of the two answers A and B.

    Each pair is shown in both orders, so a preference for the first or second place cancels. Images are prepared the training way.
    """

    def __init__(self, vlm: Vlm):
        self.vlm, self.model = vlm, vlm.model
        self.description = f"{vlm.name}, shown both images in both orders and asked {QUESTION!r}"
        self.letters = vlm.tokens("A", "B")

    @torch.no_grad()
    def compare(self, prompts: list[str], first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """prompts [P], first and second [P, 3, H, W] float in [0, 1] or uint8 -> [P] float32 in [-1, 1].

        A sharded model is called by all ranks together: each must call compare equally often, with any P of 1 or more.
        """
        texts = [self.vlm.dialogue(QUESTION, prompt, images=2) for prompt in prompts]

        def compare(rows: list[int]) -> torch.Tensor:
            return self._compare_batch([texts[row] for row in rows], first[rows], second[rows])

        return self.vlm.in_batches(self.vlm.filled_lengths(texts, TRAINING_SIZE, TRAINING_SIZE), MAX_PAIRS, compare)

    def _compare_batch(self, texts: list[str], first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        one, two = (training_images(images.to(self.vlm.job.device)) for images in (first, second))  # [P, 3, S, S]
        both = torch.cat([torch.stack([one, two], dim=1), torch.stack([two, one], dim=1)])  # [2P, 2, 3, S, S]
        margin = self.vlm.margin(texts + texts, both, self.letters, rescale=False, resize=False)  # [2P]
        as_first, as_second = torch.sigmoid(margin).chunk(2)  # p(A): of the first image, and of the second
        return as_first - as_second
