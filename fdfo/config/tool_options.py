"""The options of generate.py, metrics.py, fdfo.export, fdfo.report, fdfo.votes and rewards.serve."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fdfo.config.options import Count, Name, Options, Text

BasePreset = Literal["sd35-medium", "sd35-large", "flux2-klein", "z-image", "tiny"]


@dataclass(frozen=True)
class GenerateConfig(Options):
    """Draw a grid of images with a checkpoint, or with the base model."""

    out: Path = Path("out.jpg")
    """image file to write (.jpg or .png)"""
    checkpoint: Text | None = None
    """checkpoint folder, run folder, hub URL or hf:OWNER/NAME/FOLDER; the base model if left out"""
    preset: BasePreset = "sd35-medium"
    """base model and image settings, unless the checkpoint's run or a flag gives them"""
    pretrained_model: Name | None = None
    """hub id or folder of the base model, or tiny"""
    prompts: tuple[str, ...] = ()
    """prompts of your own"""
    prompt_file: str | None = None
    """text file with one prompt per line, or a name in prompt_sets/; showcase if left out"""
    columns: Count = 3
    """prompts side by side"""
    grid_cols: Count = 3
    """images of a prompt side by side"""
    grid_rows: Count = 1
    """rows of images of a prompt"""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """seed of the first image; each further image adds 1"""
    width: Count | None = None
    """width of an image, pixels (512)"""
    height: Count | None = None
    """height of an image, pixels (512)"""
    num_inference_steps: Count | None = None
    """solver steps (40; 10 for flux2-klein and z-image)"""
    guidance_scale: Annotated[float | None, Field(ge=1)] = None
    """classifier-free guidance (1.0, or what the checkpoint was trained with)"""
    batch_size: Count = 4
    """images drawn at a time"""


@dataclass(frozen=True)
class MetricsConfig(Options):
    """Score the images that checkpoints, or the base model, draw for a prompt set; or score a folder of images."""

    metrics: tuple[str, ...] = ("pickscore",)
    """scorers: pickscore, hpsv2, clip_h14, clip_l14, vlm_alignment, vlm_quality, vlm_photo, vlm_questions, ocr, ocr_tesseract,
    dreamsim_diversity, pixel_diversity, scene, scene_clip; vlm_..._train asks the question of training; MODULE:CLASS is a scorer of
    your own, http://HOST:PORT/PATH a server"""
    checkpoint: tuple[Text, ...] = ()
    """one or more of: checkpoint folder, run folder (all its checkpoints), hub URL, hf:OWNER/NAME/FOLDER, or the word base; the base
    model if left out"""
    preset: BasePreset = "sd35-medium"
    """base model and image settings, unless the checkpoint's run or a flag gives them"""
    pretrained_model: Name | None = None
    """hub id or folder of the base model, or tiny"""
    images: Path | None = None
    """score the images of this folder instead of drawing any. Each entry, an image or a sub-folder of images, belongs to one prompt:
    named by the prompt's number in the prompt set, from 0 (000012.png, 000012/1.png), or by the prompt itself (a red fox.png)"""
    prompt_set: str = "hpdv2"
    """name in prompt_sets/, or a text file with one prompt per line, or .jsonl with questions for vlm_questions"""
    num_prompts: Count = 500
    """number of prompts: the first of the shuffled set"""
    num_repeats: Count = 1
    """images per prompt"""
    out: Path | None = None
    """JSON file for the results; several checkpoints also give a plot beside it"""
    per_prompt: bool = False
    """also write the scores of every prompt into the JSON file"""
    save_images: Path | None = None
    """new folder that keeps the scored images"""
    prompt_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """seed of the order of prompts"""
    image_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """seed of the first image; each further image adds 1"""
    as_published: bool = False
    """draw and score as the published figures were made (docs/method.md 5): their seeds, their rounding to 8 bits, PickScore's own
    processor, and the prompts of hpdv2 without any change"""
    published_processes: Count | None = None
    """with --as-published: the number of processes whose seeds are drawn, whatever the number here (8)"""
    width: Count | None = None
    """width of an image, pixels (512)"""
    height: Count | None = None
    """height of an image, pixels (512)"""
    num_inference_steps: Count | None = None
    """solver steps (40; 10 for flux2-klein and z-image)"""
    guidance_scale: Annotated[float | None, Field(ge=1)] = None
    """classifier-free guidance (1.0, or what the checkpoint was trained with)"""
    batch_size: Count = 4
    """images drawn at a time"""
    vlm_model: str = "qwenvl-7b"
    """judge of the vlm metrics: qwenvl-7b, qwenvl-3b, qwenvl-72b, a hub id or a folder"""
    vlm_use_fsdp: bool = True
    """shard the judge over the GPUs of the job if one GPU has no room for it"""


@dataclass(frozen=True)
class ExportConfig(Options):
    """Write a checkpoint for use elsewhere: as a LoRA that diffusers loads, or merged into a whole pipeline."""

    checkpoint: Text
    """checkpoint folder, run folder (its newest intact checkpoint), hub URL, hf:OWNER/NAME/FOLDER, or a LoRA file of another program"""
    lora: Path | None = None
    """new folder for the LoRA and its model card; for Stable Diffusion 3.5 Medium also with a workflow for ComfyUI"""
    format: Literal["diffusers", "sdnext"] | None = None
    """with --lora: names of its tensors, lora_A and lora_B as diffusers and ComfyUI read them (the default), or lora_down and lora_up
    for SD.Next"""
    merge: Path | None = None
    """new folder for the whole pipeline with the LoRA merged in, and its model card"""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """with --merge: type of the pipeline's weights; by default fp32 for a run in fp32, else bf16"""
    preset: BasePreset = "sd35-medium"
    """base model, unless the checkpoint's run or a flag gives it"""
    pretrained_model: Name | None = None
    """hub id or folder of the base model, or tiny"""


@dataclass(frozen=True)
class ReportConfig(Options):
    """Write report.html: one run's curves, sheets of images and settings, or the curves of several runs."""

    runs: tuple[Path, ...]
    """run folders: one has its report.html written again, several are compared on one page"""
    out: Path | None = None
    """HTML file to write (RUN/report.html for one run, RUN/watch.html with --watch, report.html for several)"""
    watch: bool = False
    """write the page again whenever the run's log grows, until Ctrl-C; the page reloads itself"""


@dataclass(frozen=True)
class VotesConfig(Options):
    """Say how people voted in a run, how steadily, and how often a scorer agrees; or write their votes as a preference data set."""

    run: Path
    """run folder with votes.jsonl"""
    scorer: Name | None = None
    """scorer to compare with: pickscore, hpsv2, clip_h14, scene, vlm_alignment, ...; MODULE:CLASS is one of your own"""
    export: Path | None = None
    """new folder for the votes and their images, which datasets.load_dataset reads"""


@dataclass(frozen=True)
class ServeConfig(Options):
    """Serve a scorer over HTTP, so that a run elsewhere can use it: --reward-specs http://HOST:PORT/score=1.0."""

    scorer: Name
    """a scorer of single images, or MODULE:CLASS of your own"""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """port to serve on; 0: any free one"""
    host: Text = "127.0.0.1"
    """address to serve on. There is no password: whoever can reach another address than this machine's own can ask for scores"""
    vlm_model: str = "qwenvl-7b"
    """judge of the vlm scorers: qwenvl-7b, qwenvl-3b, qwenvl-72b, a hub id or a folder"""
