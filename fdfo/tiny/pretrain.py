"""Makes the tiny preset's weights: an SD3-class text-to-image model of 64 x 64 scenes, and a CLIP that judges them.

    python -m fdfo.tiny.pretrain            # all of it: about ten minutes on one H200, far longer on a CPU

The data is rendered here; a share of all caption attributes is wrong on purpose, as in captions from the web, so that
plain samples follow their caption only roughly, and guidance or a reward has something to repair. No held-out caption is
ever seen. On a GPU every training step is one CUDA graph, since steps this small are otherwise bound by launches.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL
from transformers import CLIPProcessor, PreTrainedTokenizerBase

from fdfo.tiny import SCENE_CLIP, TEXT_TOKENS, TINY_MODEL
from fdfo.tiny.architecture import build_clip_tokenizer, build_pipeline, build_scene_clip, build_vae
from fdfo.tiny.scenes import COLOURS, RELATIONS, SHAPES, Scene, all_scenes, is_held_out, render


@dataclass(frozen=True)
class PretrainConfig:
    """Train the tiny preset's models from rendered scenes."""

    out: Path = TINY_MODEL
    """folder of the text-to-image pipeline"""
    clip_out: Path = SCENE_CLIP
    """folder of the scene_clip model"""
    parts: tuple[str, ...] = ("clip", "vae", "flow")
    """what to train: clip, vae, flow; flow alone takes the VAE that lies in --out"""
    scenes: int = 131072
    """number of rendered training images"""
    corruption: float = 0.12
    """probability that an attribute of a training caption is wrong"""
    clip_steps: int = 3979
    """optimizer steps for scene_clip"""
    vae_steps: int = 6136
    """optimizer steps for the autoencoder"""
    flow_steps: int = 8610
    """optimizer steps for the transformer and its text encoders"""
    flow_batch: int = 512
    """samples per optimizer step of the transformer"""
    seed: int = 0
    """seed of data, weights and noise"""


# ---------------------------------------------------------------------------------------------------------------------
# Data


def sample_scenes(n: int, rng: random.Random) -> list[Scene]:
    """Sample n scenes that are not held out, a quarter of them with one object."""
    allowed = [scene for scene in all_scenes() if not is_held_out(scene.caption())]
    singles = [scene for scene in allowed if scene.relation is None]
    doubles = [scene for scene in allowed if scene.relation is not None]
    return [rng.choice(singles) if rng.random() < 0.25 else rng.choice(doubles) for _ in range(n)]


def corrupt(scene: Scene, rate: float, rng: random.Random) -> Scene:
    """Replace each attribute of a scene at random with the given probability; never return a held-out caption."""

    def maybe(value, choices):
        return rng.choice(list(choices)) if rng.random() < rate else value

    while True:
        changed = Scene(
            maybe(scene.background, COLOURS),
            tuple((maybe(colour, COLOURS), maybe(shape, SHAPES)) for colour, shape in scene.objects),
            scene.relation and maybe(scene.relation, RELATIONS),
        )
        colours = [changed.background, *(colour for colour, _ in changed.objects)]
        if len(set(colours)) == len(colours) and not is_held_out(changed.caption()):
            return changed


def render_all(scenes: list[Scene], seed: int, device: torch.device) -> torch.Tensor:
    """Render all images as uint8 on the device: [N, 3, 64, 64]."""
    generator = torch.Generator().manual_seed(seed)
    chunks = [render(scenes[i : i + 2048], generator, device) for i in range(0, len(scenes), 2048)]
    return torch.cat([(255 * chunk).round().to(torch.uint8) for chunk in chunks])


# ---------------------------------------------------------------------------------------------------------------------
# Training


def optimise(
    loss_of: Callable[[], torch.Tensor], modules: list[torch.nn.Module], steps: int, learning_rate: float, name: str
) -> None:
    """Run AdamW with warm-up and cosine decay on loss_of(); leave the exponential moving average in the modules."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    device = parameters[0].device
    graphed = device.type == "cuda"
    rate = torch.zeros((), device=device) if graphed else 0.0
    adam = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, capturable=graphed)
    average = [p.detach().clone() for p in parameters]
    keep = torch.ones((), device=device)  # weight of the newest parameters in the average

    def step() -> torch.Tensor:
        adam.zero_grad(set_to_none=False)
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        adam.step()
        change = torch._foreach_sub([p.detach() for p in parameters], average)
        torch._foreach_mul_(change, keep)
        torch._foreach_add_(average, change)
        return loss.detach()

    for p in parameters:
        p.grad = torch.zeros_like(p)
    run = capture(step) if graphed else step
    for i in range(steps):
        warm = min(1.0, (i + 1) / 300)
        value = learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * i / steps)).item()))
        if graphed:
            rate.fill_(value)
        else:
            adam.param_groups[0]["lr"] = value
        keep.fill_(max(0.001, 10 / (10 + i)))
        loss = run()
        if i % max(1, steps // 20) == 0 or i == steps - 1:
            print(f"{name} step {i} of {steps}: loss {loss.item():.5f}", flush=True)
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)


def capture(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Capture the step as one CUDA graph; the learning rate is still 0 while it warms up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return loss

    return replay


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """Convert uint8 images to floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def train_vae(config: PretrainConfig, pixels: torch.Tensor) -> AutoencoderKL:
    vae = build_vae().to(pixels.device)

    def loss_of() -> torch.Tensor:
        image = to_unit(pixels[torch.randint(len(pixels), (128,), device=pixels.device)])
        h = vae.encoder(image)  # [N, 32, 8, 8]
        mean, log_variance = h.chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        latent = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        error = vae.decoder(latent) - image
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return error.abs().mean() + error.square().mean() + 5e-4 * kl

    optimise(loss_of, [vae], config.vae_steps, 2e-3, "vae")
    latents = encode(vae, pixels[:8192])
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Encode to means of the latents, not yet scaled: [N, 16, 8, 8]."""
    return torch.cat([vae.encode(to_unit(chunk)).latent_dist.mean for chunk in pixels.split(1024)])


def train_clip(config: PretrainConfig, scenes: list[Scene], pixels: torch.Tensor) -> None:
    device = pixels.device
    tokenizer = build_clip_tokenizer()
    model, processor = build_scene_clip(tokenizer)
    model.to(device)
    mean = torch.tensor(processor.image_mean, device=device)[:, None, None]
    std = torch.tensor(processor.image_std, device=device)[:, None, None]
    ids = tokenise(tokenizer, [scene.caption() for scene in scenes], device)

    def loss_of() -> torch.Tensor:
        index = torch.randint(len(pixels), (1024,), device=device)
        noise = 0.03 * torch.randn(1024, 3, 1, 1, device=device)
        images = (pixels[index].float() / 255 + noise - mean) / std
        output = model(input_ids=ids[index], pixel_values=images)
        target = torch.arange(1024, device=device)
        same = (ids[index][:, None] == ids[index][None]).all(2) & ~torch.eye(1024, dtype=torch.bool, device=device)
        logits = output.logits_per_image.masked_fill(same, -1e4)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    optimise(loss_of, [model], config.clip_steps, 1e-3, "scene_clip")
    model.half().save_pretrained(config.clip_out)
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(config.clip_out)


def tokenise(tokenizer: PreTrainedTokenizerBase, captions: list[str], device: torch.device) -> torch.Tensor:
    """Tokenise, padded to the tiny model's text length: [N, 16]."""
    padded = tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    return padded.input_ids.to(device)


def train_flow(config: PretrainConfig, scenes: list[Scene], pixels: torch.Tensor, vae: AutoencoderKL) -> None:
    device = pixels.device
    pipe = build_pipeline(vae)
    pipe.to(device)
    rng = random.Random(config.seed + 1)
    captions = [corrupt(scene, config.corruption, rng).caption() for scene in scenes]
    captions = ["" if rng.random() < 0.1 else caption for caption in captions]
    clip_ids, t5_ids = (tokenise(t, captions, device) for t in (pipe.tokenizer, pipe.tokenizer_3))
    latents = (encode(vae, pixels) - vae.config.shift_factor) * vae.config.scaling_factor  # [N, 16, 8, 8]

    def loss_of() -> torch.Tensor:
        index = torch.randint(len(latents), (config.flow_batch,), device=device)
        x0, ids = latents[index], clip_ids[index]
        outputs = [encoder(ids, output_hidden_states=True) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
        clip_states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        text = torch.cat([clip_states, pipe.text_encoder_3(t5_ids[index])[0]], dim=1)  # [N, 32, TEXT_WIDTH]
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        u = torch.sigmoid(1.2 * torch.randn(config.flow_batch, device=device))
        sigma = 3 * u / (1 + 2 * u)
        noise = torch.randn_like(x0)
        x = x0 + sigma[:, None, None, None] * (noise - x0)
        v = pipe.transformer(x, text, pooled, 1000 * sigma, return_dict=False)[0]
        return (v - (noise - x0)).square().mean()

    trained = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    optimise(loss_of, trained, config.flow_steps, 1.5e-3, "flow")
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(config.out)


def main(config: PretrainConfig) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(config.seed)
    scenes = sample_scenes(config.scenes, random.Random(config.seed))
    pixels = render_all(scenes, config.seed, device)
    if "clip" in config.parts:
        train_clip(config, scenes, pixels)
    if "vae" in config.parts:
        vae = train_vae(config, pixels)
        vae.save_pretrained(config.out / "vae")
    if "flow" in config.parts:
        vae = AutoencoderKL.from_pretrained(config.out / "vae").to(device)
        train_flow(config, scenes, pixels, vae)


if __name__ == "__main__":
    main(tyro.cli(PretrainConfig))
