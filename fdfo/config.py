"""The command lines as frozen dataclasses, and their presets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"


class UserError(ValueError):
    """A mistake that the user can mend. Its text is one sentence that says what to do; command lines exit with code 2."""


@dataclass(frozen=True)
class SampleConfig:
    num_solver_steps: int = 40
    """solver steps T of a trajectory"""
    guidance_scale: float = 1.0
    """classifier-free guidance in sampling and training; 1 means none"""
    resolution: int = 512
    """width and height of the pictures, pixels"""
    batch_size: int | None = None
    """pairs a micro-batch when sampling; chosen from --max-batch-size if left out"""


@dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = 3e-5
    """AdamW learning rate"""
    clip_range: float = 0.03
    """eps of the surrogate loss: how far the ratio may move from 1"""
    adam_beta1: float = 0.9
    """AdamW beta1"""
    adam_beta2: float = 0.999
    """AdamW beta2"""
    adam_weight_decay: float = 1e-4
    """AdamW weight decay"""
    adam_epsilon: float = 1e-8
    """AdamW epsilon"""
    max_grad_norm: float = 1.0
    """norm to which the gradient of an optimizer step is clipped"""
    kl_weight: float = 0.0
    """weight of the squared distance to the base model's velocity; 0 means none"""
    batch_size: int | None = None
    """samples a micro-batch when training; chosen from --max-batch-size if left out"""


@dataclass(frozen=True)
class ChurnConfig:
    schedule: Literal["raw", "interval", "prior"] = "raw"
    """where the branches of a pair part: everywhere, around one noise level, or in the starting noise"""
    weight: float | None = None
    """amount of churn (raw 0.0025, interval 1.0, prior 0.1)"""
    weight_sd: float | None = None
    """spread of the log of the amount from pair to pair (interval 0.0, prior 1.0)"""
    mu: float | None = None
    """mean of the interval's centre, logit of the noise level (interval 1.0)"""
    sd: float | None = None
    """spread of the interval's centre from pair to pair (interval 1.5)"""
    soft_sd: float | None = None
    """width of the interval (interval 0.25)"""


@dataclass(frozen=True)
class TrainConfig:
    """Train a LoRA of a text-to-image flow model with a reward, by Finite Difference Flow Optimization."""

    preset: Literal["sd35-medium", "sd35-medium-24gb", "tiny"] = "sd35-medium"
    """set of defaults; sd35-medium-24gb is meant for one GPU of 24 GB, with a smaller judge; tiny trains a small bundled model with
    no download and no GPU"""
    sample: SampleConfig = SampleConfig()
    train: OptimConfig = OptimConfig()
    churn: ChurnConfig = ChurnConfig()
    run_name: str | None = None
    """name of the run folder after its number; by default the reward preset and the guidance"""
    runs_dir: Path = Path("runs")
    """folder that holds the run folders"""
    seed: int = 6
    """seed of the prompts' order, the noise, the adapter's start and the order of samples"""
    num_epochs: int = 1000
    """epochs of the whole run, those before a resume included"""
    save_freq: int = 5
    """epochs between checkpoints; the last epoch is always saved"""
    keep_last: int | None = None
    """newest checkpoints to keep on the disk; all if left out"""
    keep_every: int | None = None
    """with --keep-last: keep every checkpoint whose epoch is a multiple of this too"""
    resume_from: str | None = None
    """checkpoint folder, run folder (its newest whole checkpoint) or hub URL to go on from; or auto: the run folder with the
    highest number in --runs-dir whose settings are those of this command line, whatever --num-epochs, --save-freq, --keep-...,
    --max-batch-size, the two --...batch-size, --memory-efficient, --gradient-checkpointing, --offload-..., --compile, --vlm-use-fsdp,
    --log-wandb, --strict, --timeout-minutes, --eval-every and --eval-least-diversity say, from its newest whole checkpoint or, where
    it has none, from its beginning; a new run where there is no such folder"""
    strict: bool = False
    """stop with a checkpoint where an epoch's health check or an evaluation warns"""
    timeout_minutes: float = 30.0
    """minutes without progress (a micro-batch, an optimizer step, a stage) after which the job is ended"""
    lora_rank: int = 32
    """rank of the LoRA"""
    lora_alpha: int = 64
    """alpha of the LoRA; its output is scaled by alpha / rank"""
    vlm_model_name: str = "qwenvl-7b"
    """judge of the vlm rewards: qwenvl-7b, qwenvl-3b, qwenvl-72b, a hub id or a folder"""
    vlm_use_fsdp: bool = True
    """shard the judge over the GPUs of the job where one has no room for it"""
    memory_efficient: bool = True
    """text encoders leave the GPU while nothing is encoded"""
    gradient_checkpointing: bool = False
    """keep the inputs of the transformer's blocks alone, and compute every block again in the backward: less memory, more time"""
    offload_scorers: bool = False
    """the scorers' models wait in host memory and come to the GPU one after the other to score, as those of evaluations
    alone always do; a scorer of your own takes part where its attribute `model` is a torch.nn.Module on the GPU; on a CPU nothing
    moves"""
    offload_trajectories: bool = False
    """keep the trajectories of an epoch in host memory; on a CPU they are there anyway"""
    pretrained_model: str = SD35_MEDIUM
    """hub id or folder of the StableDiffusion3Pipeline to train, or tiny for the bundled one"""
    prompt_set: str = "pickscore_train"
    """name in prompt_sets/ or a text file, one prompt a line"""
    total_pairs_per_epoch: int = 432
    """pairs sampled in an epoch by all processes together"""
    gradient_steps_per_epoch: int = 4
    """optimizer steps an epoch"""
    max_batch_size: int | None = None
    """largest micro-batch, pairs in sampling and samples in training (6, or 13 with 8 or more processes)"""
    reward_preset: str = "combined"
    """weighted set of scorers: pickscore, vlm_alignment, combined, or scene (for the tiny preset)"""
    reward_specs: tuple[str, ...] = ()
    """scorers and weights of your own instead of a preset: NAME=WEIGHT or MODULE:CLASS=WEIGHT"""
    log_wandb: bool = False
    """log to Weights & Biases too"""
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """type in which the transformer and the decoder compute"""
    compile: bool = True
    """compile the transformer's blocks and the decoder before the first epoch; on a CPU nothing is compiled"""
    eval_every: int = 10
    """epochs between evaluations on held-out prompts; epoch 0 and the last one are evaluated too"""
    eval_prompts: int | None = None
    """held-out prompts: 128 if left out, or a tenth of a --prompt-set that is smaller than 1,280; 0 means no evaluation"""
    eval_prompt_set: str | None = None
    """prompts to evaluate on, which are never trained on; if left out they are split off --prompt-set"""
    eval_metrics: tuple[str, ...] = ("clip_h14", "dreamsim_diversity")
    """scorers of the evaluations beside the reward's own; they choose checkpoints/best. A diversity makes it two pictures a prompt"""
    eval_least_diversity: float = 0.5
    """share of epoch 0's diversity below which an evaluation warns"""


@dataclass(frozen=True)
class GenerateConfig:
    """Draw a grid of pictures with a checkpoint, or with the base model."""

    out: Path
    """picture file to write (.jpg or .png)"""
    checkpoint: str | None = None
    """checkpoint folder, run folder, hub URL or hf:OWNER/NAME/FOLDER; the base model if left out"""
    preset: Literal["sd35-medium", "tiny"] = "sd35-medium"
    """base model and picture settings where neither the checkpoint's run nor a flag gives them"""
    pretrained_model: str | None = None
    """hub id or folder of the base model, or tiny"""
    prompts: tuple[str, ...] = ()
    """prompts of your own"""
    prompt_file: str | None = None
    """text file with one prompt a line, or a name in prompt_sets/; showcase if left out"""
    columns: int = 3
    """prompts side by side"""
    grid_cols: int = 3
    """pictures of a prompt side by side"""
    grid_rows: int = 1
    """rows of pictures of a prompt"""
    seed: int = 0
    """seed of the first picture; each further one adds 1"""
    width: int | None = None
    """width of a picture, pixels (512)"""
    height: int | None = None
    """height of a picture, pixels (512)"""
    num_inference_steps: int | None = None
    """solver steps (40)"""
    guidance_scale: float | None = None
    """classifier-free guidance (1.0, or what the checkpoint was trained with)"""
    batch_size: int = 4
    """pictures drawn at a time"""


@dataclass(frozen=True)
class MetricsConfig:
    """Score the pictures that checkpoints, or the base model, draw for a prompt set; or pictures that are there already."""

    metrics: tuple[str, ...]
    """scorers: pickscore, hpsv2, clip_h14, clip_l14, vlm_alignment, vlm_quality, vlm_photo, dreamsim_diversity, pixel_diversity,
    scene, scene_clip; vlm_..._train asks as training does; MODULE:CLASS is one of your own"""
    checkpoint: tuple[str, ...] = ()
    """one or more of: checkpoint folder, run folder (all its checkpoints), hub URL, hf:OWNER/NAME/FOLDER, or the word base; the
    base model if left out"""
    preset: Literal["sd35-medium", "tiny"] = "sd35-medium"
    """base model and picture settings where neither the checkpoint's run nor a flag gives them"""
    pretrained_model: str | None = None
    """hub id or folder of the base model, or tiny"""
    images: Path | None = None
    """score the pictures of this folder instead of drawing any. Each entry, a picture or a sub-folder of pictures, is one
    prompt: by its number in the prompt set, from 0 (000012.png, 000012/1.png), or named as the prompt itself (a red fox.png)"""
    prompt_set: str = "pickscore_train"
    """name in prompt_sets/ or a text file, one prompt a line"""
    num_prompts: int = 500
    """prompts to draw, the first of the shuffled set"""
    num_repeats: int = 1
    """pictures a prompt"""
    out: Path | None = None
    """JSON file for the results; several checkpoints give a plot beside it"""
    per_prompt: bool = False
    """write the scores of every prompt into the JSON file too"""
    save_images: Path | None = None
    """new folder that keeps the pictures that were scored"""
    prompt_seed: int = 0
    """seed of the prompts' order"""
    image_seed: int = 0
    """seed of the first picture; each further one adds 1"""
    width: int | None = None
    """width of a picture, pixels (512)"""
    height: int | None = None
    """height of a picture, pixels (512)"""
    num_inference_steps: int | None = None
    """solver steps (40)"""
    guidance_scale: float | None = None
    """classifier-free guidance (1.0, or what the checkpoint was trained with)"""
    batch_size: int = 4
    """pictures drawn at a time"""
    vlm_model: str = "qwenvl-7b"
    """judge of the vlm metrics: qwenvl-7b, qwenvl-3b, qwenvl-72b, a hub id or a folder"""
    vlm_use_fsdp: bool = True
    """shard the judge over the GPUs of the job where one has no room for it"""


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint for use elsewhere: as a LoRA that diffusers loads, or merged into a whole pipeline."""

    checkpoint: str
    """checkpoint folder, run folder (its newest whole checkpoint), hub URL or hf:OWNER/NAME/FOLDER"""
    lora: Path | None = None
    """new folder for the LoRA in diffusers' format and its model card"""
    merge: Path | None = None
    """new folder for the whole pipeline with the adapter merged in, and its model card"""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """with --merge: type of the pipeline's weights; by default fp32 for a run in fp32, else bf16"""
    push_to_hub: str | None = None
    """OWNER/NAME on the hub that the LoRA, or with --merge the pipeline, is uploaded to; it is made where it does not exist"""
    public: bool = False
    """with --push-to-hub: everybody may see it; by default only its owner"""
    preset: Literal["sd35-medium", "tiny"] = "sd35-medium"
    """base model where neither the checkpoint's run nor a flag gives it"""
    pretrained_model: str | None = None
    """hub id or folder of the base model, or tiny"""


@dataclass(frozen=True)
class ReportConfig:
    """Write report.html: one run's curves, sheets of pictures and settings, or the curves of several runs."""

    runs: tuple[Path, ...]
    """run folders; one has its report.html written again, several are compared in one page"""
    out: Path | None = None
    """HTML file to write (RUN/report.html for one run, report.html for several)"""


PRESETS = {
    "sd35-medium": TrainConfig(),
    "sd35-medium-24gb": TrainConfig(
        preset="sd35-medium-24gb",
        vlm_model_name="qwenvl-3b",
        vlm_use_fsdp=False,
        gradient_checkpointing=True,
        offload_scorers=True,
        offload_trajectories=True,
        max_batch_size=4,
    ),
    "tiny": TrainConfig(
        preset="tiny",
        sample=SampleConfig(num_solver_steps=8, resolution=64),
        train=OptimConfig(learning_rate=2e-4, clip_range=0.2),
        churn=ChurnConfig(weight=0.02),
        num_epochs=20,
        memory_efficient=False,
        pretrained_model="tiny",
        prompt_set="tiny",
        total_pairs_per_epoch=128,
        max_batch_size=256,
        reward_preset="scene",
        precision="fp32",
        compile=False,
        eval_every=5,
        eval_prompt_set="tiny_heldout",
        eval_metrics=("scene_clip", "pixel_diversity"),
    ),
}
