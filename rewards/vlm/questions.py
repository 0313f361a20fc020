"""`vlm_questions`: the questions that come with a prompt, asked one by one, after TIFA."""

import torch
import torch.nn.functional as F

from fdfo.config.errors import UserError
from fdfo.storage.prompts import questions_of
from rewards.vlm.judge import Vlm, Way, yes_margins

ENDINGS = {"training": "Answer Yes or No.", "metrics": "Answer with Yes or No."}


class VlmQuestions:
    """100 times the geometric mean of P(yes) = sigmoid(logit Yes - logit No) over the questions of an image's prompt.

    The questions are answered apart from each other, in batches across images. Images are prepared as for VlmScorer.
    """

    def __init__(self, vlm: Vlm, preprocessing: Way):
        self.vlm, self.model, self.preprocessing = vlm, vlm.model, preprocessing
        self.description = f"{vlm.name}, asked the questions of each prompt, images prepared the {preprocessing} way"

    def check_prompts(self, prompts: list[str]) -> None:
        """Raise UserError for a prompt without questions."""
        for prompt in prompts:
            if not questions_of(prompt):
                raise UserError(
                    f"The prompt {str(prompt)[:200]!r} has no questions: give a .jsonl file with lines such as "
                    '{"prompt": "a red cube", "questions": ["Is there a cube?", "Is the cube red?"]}, or --prompt-set questions.'
                )

    @torch.no_grad()
    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        """Score prompts [N], images [N, 3, H, W] float in [0, 1] or uint8 -> [N] float32 in [0, 100]. Raises UserError.

        A sharded model is called by all ranks together: each must call score equally often, with any N of 1 or more.
        """
        self.check_prompts(prompts)
        counts = torch.tensor([len(questions_of(prompt)) for prompt in prompts])
        rows = torch.arange(len(prompts)).repeat_interleave(counts)  # [Q], the image of each question
        texts = [
            self.vlm.dialogue(f"{{prompt}} {ENDINGS[self.preprocessing]}", question)
            for prompt in prompts for question in questions_of(prompt)
        ]  # fmt: skip
        logs = F.logsigmoid(yes_margins(self.vlm, texts, images, rows.tolist(), self.preprocessing)).cpu()  # [Q]
        means = torch.zeros(len(prompts)).index_add_(0, rows, logs) / counts
        return 100 * means.exp()
