"""Qwen2.5-VL as a judge (METHOD.md 5): vlm_alignment, vlm_quality, vlm_photo. One class; the question is an argument."""

import torch
import torch.nn.functional as F
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from fdfo.distributed import Job
from fdfo.hub import hub_errors

VLM_MODELS = {
    "qwenvl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwenvl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwenvl-72b": "Qwen/Qwen2.5-VL-72B-Instruct",
}
TRAINING_QUESTION = 'Does this image match the caption "{prompt}"? Answer Yes or No.'
METRIC_QUESTIONS = {
    "vlm_alignment": 'Does this image match the caption "{prompt}"? Answer with Yes or No.',
    "vlm_quality": "Is this image of professional quality? Answer with Yes or No.",
    "vlm_photo": "Does this image look photorealistic? Answer with Yes or No.",
}
FLOAT_SIZE = 504  # side to which unquantised pictures are resized
MAX_BATCH = 16


def question_for(name: str, training: bool) -> str:
    """The question of a scorer; training words the one about alignment differently, so that its values differ too."""
    return TRAINING_QUESTION if training and name == "vlm_alignment" else METRIC_QUESTIONS[name]


class VlmScorer:
    """100 sigmoid(logit Yes - logit No) at the answer position, in bfloat16 on a GPU and float32 on a CPU."""

    def __init__(self, model: str, question: str, job: Job, shard: bool = False):
        """model: a key of VLM_MODELS, a hub id or a folder; shard: spread the weights over the job's processes."""
        name = VLM_MODELS.get(model, model)
        self.question, self.job, self.sharded = question, job, shard and job.world_size > 1
        dtype = torch.bfloat16 if job.device.type == "cuda" else torch.float32
        with hub_errors(name):
            self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(name, dtype=dtype).requires_grad_(False).eval()
            self.processor = AutoProcessor.from_pretrained(name)
        self.processor.tokenizer.padding_side = "left"
        self.yes, self.no = (self.processor.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Yes", "No"))
        if self.sharded:
            shard_over_job(self.model)
        self.model.to(job.device)

    @torch.no_grad()
    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        """prompts [N], images [N, 3, H, W] float in [0, 1] or uint8 -> [N] float32 in [0, 100].

        A sharded model is called by all ranks together: each must call score equally often, with any N of 1 or more.
        """
        batches = -(-len(prompts) // MAX_BATCH)
        rounds = self.job.max(batches) if self.sharded else batches
        scores = []
        for i in range(rounds):
            start = min(i, batches - 1) * MAX_BATCH  # a rank that is through repeats its last batch
            values = self._score_batch(prompts[start : start + MAX_BATCH], images[start : start + MAX_BATCH])
            if i < batches:
                scores.append(values)
        return torch.cat(scores)

    def _score_batch(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        quantised = images.dtype == torch.uint8
        if not quantised:
            images = F.interpolate(
                images.float(), (FLOAT_SIZE, FLOAT_SIZE), mode="bilinear", align_corners=False, antialias=False
            )
        inputs = self.processor(
            text=[self._dialogue(prompt) for prompt in prompts],
            images=list(images),
            padding=True,
            return_tensors="pt",
            do_rescale=quantised,
            do_resize=quantised,
        ).to(self.job.device)
        logits = self.model(**inputs, logits_to_keep=1).logits[:, -1].float()  # [N, vocabulary]
        return 100 * torch.sigmoid(logits[:, self.yes] - logits[:, self.no])

    def _dialogue(self, prompt: str) -> str:
        """The text up to the answer. The caption is put in as it is: it is data, not a template."""
        user = [{"type": "image"}, {"type": "text", "text": self.question.replace("{prompt}", prompt)}]
        turns = [
            {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
            {"role": "user", "content": user},
        ]
        return self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def shard_over_job(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """FSDP2: every block of the language model and of the vision tower is gathered when it is needed."""
    from torch.distributed.fsdp import fully_shard

    for block in [*model.model.language_model.layers, *model.model.visual.blocks]:
        fully_shard(block)
    fully_shard(model)
