"""The options of train.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fdfo.config.options import CHANGEABLE, FREE, Count, Name, NotNegative, Options, Positive, Text

SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
SD35_LARGE = "stabilityai/stable-diffusion-3.5-large"
KLEIN_4B = "black-forest-labs/FLUX.2-klein-base-4B"
KLEIN_9B = "black-forest-labs/FLUX.2-klein-base-9B"
Z_IMAGE = "Tongyi-MAI/Z-Image"


@dataclass(frozen=True)
class SampleConfig(Options):
    num_solver_steps: Count = 40
    """solver steps T of a trajectory"""
    guidance_scale: Annotated[float, Field(ge=1)] = 1.0
    """classifier-free guidance in sampling and training; 1 means none"""
    resolution: Annotated[int, Field(ge=16, le=1_000_000, multiple_of=16)] = 512
    """width and height of the images, pixels"""
    batch_size: Annotated[Count | None, FREE] = None
    """pairs per micro-batch in sampling; derived from --max-batch-size if left out"""


@dataclass(frozen=True)
class OptimConfig(Options):
    learning_rate: Annotated[Positive, CHANGEABLE] = 3e-5
    """AdamW learning rate"""
    clip_range: Annotated[Positive, CHANGEABLE] = 0.03
    """eps of the surrogate loss: how far the ratio may move from 1"""
    adam_beta1: Annotated[float, Field(ge=0, lt=1), CHANGEABLE] = 0.9
    """AdamW beta1"""
    adam_beta2: Annotated[float, Field(ge=0, lt=1), CHANGEABLE] = 0.999
    """AdamW beta2"""
    adam_weight_decay: Annotated[NotNegative, CHANGEABLE] = 1e-4
    """AdamW weight decay"""
    adam_epsilon: Annotated[Positive, CHANGEABLE] = 1e-8
    """AdamW epsilon"""
    max_grad_norm: Annotated[Positive, CHANGEABLE] = 1.0
    """norm to which the gradient of an optimizer step is clipped"""
    kl_weight: Annotated[NotNegative, CHANGEABLE] = 0.0
    """weight of the squared distance to the base model's velocity; 0 means none"""
    proximal_weight: Annotated[NotNegative, CHANGEABLE] = 0.0
    """weight of the squared distance to the velocity that sampled, as a multiple of each sample's |dR|; 0, as published, means none
    (docs/gap.md)"""
    forward_process: bool = False
    """train on final latents that are noised anew, each pulled towards its own image or pushed away from it, instead of on
    trajectories and the difference of a pair; breaks at a high learning rate without a proximal weight (docs/gap.md)"""
    batch_size: Annotated[Count | None, FREE] = None
    """samples per micro-batch in training; derived from --max-batch-size if left out"""
    steps_per_trajectory: Count | None = None
    """solver steps of a trajectory to train on: one drawn from each of that many equal parts of the grid, anew for each pair of each
    epoch; all if left out"""
    branches: Literal["both", "one"] = "both"
    """branches of a pair to train on: both, or at each of its steps one drawn at random"""


@dataclass(frozen=True)
class ChurnConfig(Options):
    schedule: Literal["raw", "interval", "prior"] = "raw"
    """where the branches of a pair part: at every noise level, around one noise level, or in the starting noise"""
    weight: Positive | None = None
    """amount of churn (raw 0.0025, interval 1.0, prior 0.1)"""
    weight_sd: NotNegative | None = None
    """standard deviation, over pairs, of the log of the amount (interval 0.0, prior 1.0)"""
    mu: float | None = None
    """mean of the interval's centre, as the logit of the noise level (interval 1.0)"""
    sd: NotNegative | None = None
    """standard deviation, over pairs, of the interval's centre (interval 1.5)"""
    soft_sd: Positive | None = None
    """width of the interval (interval 0.25)"""


@dataclass(frozen=True)
class TrainConfig(Options):
    """Train a LoRA of a text-to-image flow model with a reward, by Finite Difference Flow Optimization."""

    preset: Literal[
        "sd35-medium", "sd35-medium-fast", "sd35-medium-24gb", "sd35-large", "flux2-klein", "z-image", "tiny", "tiny-published"
    ] = "sd35-medium"
    """set of defaults: sd35-medium, as published; sd35-medium-fast, which trains on a subset of each epoch's samples;
    sd35-medium-24gb, the same for one GPU of 24 GB, with a smaller judge; tiny, a small bundled model that needs no download and no
    GPU, trained by the forward process (docs/gap.md); tiny-published, the same model trained as published.
    Other base models, whose learning rate, clip range and churn are untried on real weights: flux2-klein (4B) for 24 GB, z-image and
    sd35-large for 48 GB"""
    sample: SampleConfig = SampleConfig()
    train: OptimConfig = OptimConfig()
    churn: ChurnConfig = ChurnConfig()
    run_name: Annotated[str | None, Field(pattern=r"^[\w.-]+$")] = None
    """name of the run folder after its number; by default the reward preset and the guidance"""
    runs_dir: Annotated[Path, FREE] = Path("runs")
    """folder that holds the run folders"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 6
    """seed of the order of prompts, the noise, the LoRA's start and the order of samples"""
    num_epochs: Annotated[Count, FREE] = 1000
    """epochs of the whole run, including those before a resume"""
    save_freq: Annotated[Count, FREE] = 5
    """epochs between checkpoints; the last epoch is always saved"""
    keep_last: Annotated[Count | None, FREE] = None
    """number of newest checkpoints to keep on disk, and one more until images were drawn with the newest; all if left out"""
    keep_every: Annotated[Count | None, FREE] = None
    """with --keep-last: also keep every checkpoint whose epoch is a multiple of this"""
    resume_from: Annotated[Text | None, FREE] = None
    """run folder (its newest intact checkpoint), checkpoint folder, hub URL, or a LoRA file of another program to start from. auto: resume the run with the highest
    number in --runs-dir whose settings equal this command line's, or start a new run if there is none; flags that do not affect
    results may differ"""
    strict: Annotated[bool, FREE] = False
    """stop with a checkpoint if an epoch's health check or an evaluation warns"""
    timeout_minutes: Annotated[float, Field(gt=0, le=1e5), FREE] = 30.0
    """minutes without progress (a micro-batch, an optimizer step, a stage) after which the job ends"""
    lora_rank: Count = 32
    """rank of the LoRA; a run that starts from an adapter takes over the adapter's"""
    lora_alpha: Annotated[int | float, Field(gt=0, le=1_000_000)] = 64
    """alpha of the LoRA; its output is scaled by alpha / rank. Taken over like the rank"""
    vlm_model_name: str = "qwenvl-7b"
    """judge of the vlm rewards: qwenvl-7b, qwenvl-3b, qwenvl-72b, a hub id or a folder"""
    vlm_use_fsdp: Annotated[bool, FREE] = True
    """shard the judge over the GPUs of the job if one GPU has no room for it"""
    memory_efficient: Annotated[bool, FREE] = True
    """keep the text encoders in host memory while no prompts are encoded"""
    gradient_checkpointing: Annotated[bool, FREE] = False
    """store only the inputs of the transformer's blocks and recompute each block in the backward pass: less memory, more time"""
    offload_scorers: Annotated[bool, FREE] = False
    """keep the scorers' models in host memory and bring each to the GPU only to score. Scorers used by evaluations alone are always
    offloaded. A scorer of your own takes part if its attribute `model` is a torch.nn.Module on the GPU"""
    offload_trajectories: Annotated[bool, FREE] = False
    """keep the trajectories of an epoch in host memory"""
    pretrained_model: Name = SD35_MEDIUM
    """hub id or folder of the pipeline to train (Stable Diffusion 3, FLUX.2-klein or Z-Image: docs/bases.md), or tiny for the bundled
    one"""
    prompt_set: Name = "pickscore_train"
    """name in prompt_sets/, or a text file with one prompt per line, or .jsonl with questions for vlm_questions"""
    total_pairs_per_epoch: Count = 432
    """pairs sampled per epoch by all processes together"""
    gradient_steps_per_epoch: Count = 4
    """optimizer steps per epoch"""
    max_batch_size: Annotated[Count | None, FREE] = None
    """largest micro-batch: pairs in sampling, samples in training (6, or 13 with 8 or more processes)"""
    reward_preset: str = "combined"
    """weighted set of scorers: pickscore, vlm_alignment, combined, or scene (for the tiny preset); vlm_pair; or human, where people
    choose on a page in the browser, with defaults of its own for the size of an epoch and the like (docs/human.md)"""
    reward_specs: tuple[Name, ...] = ()
    """scorers and weights of your own instead of a preset: NAME=WEIGHT, MODULE:CLASS=WEIGHT, or the address of a server, such as
    http://127.0.0.1:8000/score=1.0 (docs/rewards.md)"""
    reward_scale: Literal["off", "std"] = "off"
    """off: scorers are summed with their weights, as published; std: each scorer's differences within pairs are divided by their
    running spread first, so that equal weights pull equally"""
    human_port: Annotated[int, Field(ge=0, le=65535), FREE] = 8321
    """port of the page on which people judge; 0: any free one"""
    human_host: Annotated[Text, FREE] = "127.0.0.1"
    """address that the page is served on. For another one than this machine's own, its URL has a token: whoever has it steers the
    training"""
    human_timeout: Annotated[Positive, FREE] = 60.0
    """minutes without a vote after which an epoch goes on with the pairs that have one, or the run stops with a checkpoint"""
    human_enough: Annotated[float, Field(gt=0, le=1), FREE] = 0.5
    """least share of an epoch's pairs with a vote for it to go on after --human-timeout"""
    human_shown_twice: Annotated[float, Field(ge=0, le=1), FREE] = 0.0
    """share of the pairs that are shown a second time, to see how steady the choices are; the mean counts"""
    votes: Annotated[Path | None, FREE] = None
    """train from recorded votes, such as RUN/votes.jsonl, with nobody there and no page"""
    log_wandb: Annotated[bool, FREE] = False
    """also log to Weights & Biases"""
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """compute type of the transformer and the decoder; fp16 overflows in FLUX.2-klein and Z-Image, which need bf16"""
    compile: Annotated[bool, FREE] = True
    """compile the transformer's blocks and the decoder before the first epoch (on a GPU)"""
    eval_every: Annotated[Count, FREE] = 10
    """epochs between evaluations on held-out prompts; epoch 0 and the last epoch are evaluated too"""
    eval_prompts: Annotated[int | None, Field(ge=0, le=1_000_000)] = None
    """number of held-out prompts: 128 if left out, or a tenth of a --prompt-set with fewer than 1,280 prompts; 0 means no evaluation"""
    eval_prompt_set: str | None = None
    """prompts to evaluate on, which are never trained on; split off --prompt-set if left out"""
    eval_metrics: tuple[str, ...] = ("clip_h14", "dreamsim_diversity")
    """scorers of the evaluations beside the reward's own; they select checkpoints/best. With a diversity metric, two images per prompt
    are drawn"""
    eval_least_diversity: Annotated[float, Field(ge=0, le=1), FREE] = 0.5
    """an evaluation warns if a diversity falls below this share of its value at epoch 0"""
