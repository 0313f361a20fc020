"""Qwen2.5-VL as a judge (docs/method.md 5): vlm_alignment, vlm_quality, vlm_photo, with the question of metrics or of training."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from fdfo.config.errors import UserError
from fdfo.distributed.job import Job
from fdfo.model.acceleration import pad_rows
from fdfo.storage.hub import hub_errors
from rewards.vlm.loading import load_sharded, needs_sharding, use_varlen_attention

VLM_MODELS = {
    "qwenvl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwenvl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwenvl-72b": "Qwen/Qwen2.5-VL-72B-Instruct",
}
QUESTIONS = {
    "vlm_alignment": 'Does this image match the caption "{prompt}"? Answer with Yes or No.',
    "vlm_quality": "Is this image of professional quality? Answer with Yes or No.",
    "vlm_photo": "Does this image look photorealistic? Answer with Yes or No.",
    "vlm_alignment_train": 'Does this image match the caption "{prompt}"? Answer Yes or No.',
    "vlm_quality_train": "Is this image of professional quality? Answer with Yes or No.",
    "vlm_photo_train": "Does this image look photorealistic? Answer with Yes or No.",
}
TRAINING_SIZE = 504  # side to which the training way resizes images, pixels
MAX_BATCH = 16
Way = Literal["training", "metrics"]  # how images are prepared (docs/method.md 5)
LENGTH_STEP = 128  # a row's tokens, of image, question and caption together, are filled up to a multiple of this


class Vlm:
    """The model and its processor on the job's device, bfloat16 on a GPU and float32 on a CPU. Loaded once for all questions."""

    def __init__(self, model: str, job: Job, shard: bool = False, whole: bool = False):
        """model: a key of VLM_MODELS, a hub id or a folder; shard: shard the weights over the job's processes if one GPU
        has no room for them; whole: they must not be sharded, since they leave the GPU between two calls.
        Raises UserError if the model cannot be loaded, or would have to be sharded and must not be."""
        self.name, self.job = VLM_MODELS.get(model, model), job
        dtype = torch.bfloat16 if job.device.type == "cuda" else torch.float32
        with hub_errors(self.name):
            self.processor = AutoProcessor.from_pretrained(self.name)
            self.sharded = shard and needs_sharding(self.name, dtype, job)
        if self.sharded and whole:
            raise UserError(
                "--offload-scorers cannot move a VLM that is sharded over GPUs: add --no-vlm-use-fsdp where one GPU holds it by "
                "itself, or leave --offload-scorers out."
            )
        with hub_errors(self.name):
            if self.sharded:
                self.model = load_sharded(self.name, dtype, job)
            else:
                self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(self.name, dtype=dtype).to(job.device)
        self.model.requires_grad_(False).eval()
        use_varlen_attention(self.model.model.visual, job.device)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"
        self.yes_no = self.tokens("Yes", "No")
        self.control_tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]

    def tokens(self, *answers: str) -> list[int]:
        """Return the first token of each answer."""
        return [self.processor.tokenizer.encode(answer, add_special_tokens=False)[0] for answer in answers]

    @torch.no_grad()
    def margin(self, texts: list[str], images: torch.Tensor, answers: list[int], rescale: bool, resize: bool) -> torch.Tensor:
        """Return the logit of the first of two answers minus that of the second, at the answer position.

        texts [N] from dialogue(), images [N, K, 3, H, W], K of each text, answers: two tokens -> [N] float32. N K is at most
        MAX_BATCH. Texts are filled up to a multiple of LENGTH_STEP. A GPU's kernels round differently for other shapes, so on a
        GPU rows are added up to MAX_BATCH images. If all texts have one filled length, an image's score does not depend on its
        neighbours, or on how many images this process has.
        """
        rows, full = len(texts), MAX_BATCH // images.shape[1]
        if self.job.device.type == "cuda":
            texts, images = texts + texts[:1] * (full - rows), pad_rows(images, full)
        inputs = self.processor(
            text=texts, images=list(images.flatten(0, 1)), padding=True, pad_to_multiple_of=LENGTH_STEP, return_tensors="pt",
            do_rescale=rescale, do_resize=resize,
        ).to(self.job.device)  # fmt: skip
        logits = self.model(**inputs, logits_to_keep=1).logits[:rows, -1].float()  # [N, vocabulary]
        return logits[:, answers[0]] - logits[:, answers[1]]

    def filled_lengths(self, texts: list[str], height: int, width: int) -> list[int]:
        """Return how many tokens each text from dialogue() is filled up to, with its images of this size.

        In the text, an image has one placeholder.
        """
        images = self.processor.image_processor
        tokens = images.get_number_of_image_patches(height, width) // images.merge_size**2  # of an image
        rows = self.processor.tokenizer(texts)["input_ids"]
        lengths = [len(row) + (tokens - 1) * row.count(self.processor.image_token_id) for row in rows]
        return [-(-length // LENGTH_STEP) * LENGTH_STEP for length in lengths]

    def in_batches(self, lengths: list[int], size: int, answer: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
        """Return what `answer` gives for the rows of these filled lengths [N], at most `size` rows of one length at a time: [N].

        A sharded model is called by all ranks together: each must call this equally often, with any N of 1 or more. Ranks
        may have other lengths, since they share only the weights.
        """
        job, answers = self.job if self.sharded else Job(0, 1, self.job.device), torch.empty(len(lengths), device=self.job.device)
        for rows, _ in job.rounds(batches_of_one_length(lengths, size)):
            answers[rows] = answer(rows)
        return answers

    def dialogue(self, question: str, prompt: str, images: int = 1) -> str:
        """Return the text up to the answer, with its images before the question.

        The caption is data: it is no template, and a blank breaks up control tokens in it.
        """
        for token in self.control_tokens:
            prompt = prompt.replace(token, f"{token[0]} {token[1:]}")
        user = [{"type": "image"}] * images + [{"type": "text", "text": question.replace("{prompt}", prompt)}]
        turns = [
            {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
            {"role": "user", "content": user},
        ]
        return self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def batches_of_one_length(lengths: list[int], size: int) -> list[list[int]]:
    """Return the rows of each batch, at most `size` of one length."""
    groups = {length: [] for length in lengths}
    for row, length in enumerate(lengths):
        groups[length].append(row)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


class VlmScorer:
    """100 sigmoid(logit Yes - logit No) of one question.

    preprocessing "training": images as unquantised floats, resized to 504 x 504 (bilinear, no antialias), the processor
    neither rescales nor resizes; "metrics": through the model's own processor (docs/method.md 5).
    """

    def __init__(self, vlm: Vlm, question: str, preprocessing: Way):
        self.vlm, self.model, self.question, self.preprocessing = vlm, vlm.model, question, preprocessing
        self.description = f"{vlm.name}, asked {question!r}, images prepared the {preprocessing} way"

    @torch.no_grad()
    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        """Score prompts [N], images [N, 3, H, W] float in [0, 1] or uint8 -> [N] float32 in [0, 100].

        A sharded model is called by all ranks together: each must call score equally often, with any N of 1 or more.
        """
        texts = [self.vlm.dialogue(self.question, prompt) for prompt in prompts]
        return 100 * torch.sigmoid(yes_margins(self.vlm, texts, images, list(range(len(texts))), self.preprocessing))


def yes_margins(vlm: Vlm, texts: list[str], images: torch.Tensor, shown: list[int], preprocessing: Way) -> torch.Tensor:
    """Return logit Yes - logit No of texts that show an image each -> [N] float32.

    texts [N] from dialogue(), images [M, 3, H, W] float in [0, 1] or uint8, shown [N]: the number of each text's image.
    """
    raw = preprocessing == "metrics"  # the processor resizes

    def margin(rows: list[int]) -> torch.Tensor:
        own = images[[shown[row] for row in rows]].to(vlm.job.device)
        prepared = own if raw else training_images(own)
        rescale = raw and own.dtype == torch.uint8
        return vlm.margin([texts[row] for row in rows], prepared[:, None], vlm.yes_no, rescale=rescale, resize=raw)

    height, width = images.shape[-2:] if raw else (TRAINING_SIZE, TRAINING_SIZE)
    return vlm.in_batches(vlm.filled_lengths(texts, height, width), MAX_BATCH, margin)


def training_images(images: torch.Tensor) -> torch.Tensor:
    """Prepare images the training way: [N, 3, H, W] float in [0, 1] or uint8 -> [N, 3, TRAINING_SIZE, TRAINING_SIZE] float32."""
    floats = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return F.interpolate(floats, (TRAINING_SIZE, TRAINING_SIZE), mode="bilinear", align_corners=False, antialias=False)
