"""How far the fast model's velocity and gradient are from float32's, at full size with random weights, beside eager half precision.

python benchmarks/random_hub.py --parts sd35 --out /dev/shm/random_hub
export HF_HOME=/dev/shm/random_hub HF_HUB_OFFLINE=1
python benchmarks/precision.py --out precision.json
python benchmarks/precision.py --compare one.pt two.pt        # relative differences of what full_size.py --gradient kept

All models have the same weights, a LoRA whose B is not zero, and the same inputs: latents between noise and noise, at the noise
levels of a trajectory. The gradient is that of an optimizer step at unchanged weights, each model's own velocity being the one that sampled;
a sample's share of the loss is that of the default plan, 1 / 8,640.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from fdfo.config.errors import UserError  # noqa: E402
from fdfo.config.plan import BatchPlan, plan_batches  # noqa: E402
from fdfo.config.presets import PRESETS
from fdfo.config.train_options import SampleConfig, TrainConfig  # noqa: E402
from fdfo.distributed.launch import run_command_line  # noqa: E402
from fdfo.distributed.machine import versions  # noqa: E402
from fdfo.method.rollout import Differences, PairShare, Rollout, pair_samples  # noqa: E402
from fdfo.method.update import EpochData, StepSamples, accumulate_gradient  # noqa: E402
from fdfo.model.flow_model import FlowModel  # noqa: E402
from fdfo.storage.prompts import load_prompts  # noqa: E402

STEP_SAMPLES = 8640  # samples of an optimizer step of the default plan


@dataclass(frozen=True)
class PrecisionConfig:
    """Compare the fast model with float32."""

    preset: str = "sd35-medium"
    """sd35-medium, or tiny-published for a try"""
    pairs: int = 4
    """pairs of trajectories"""
    samples: int = 104
    """samples of the gradient, drawn from those trajectories' steps"""
    reward_spreads: tuple[float, ...] = (0.1, 1.0)
    """standard deviations of the reward within a pair"""
    scales: tuple[float, ...] = (2.0**16, 2.0**20, 2.0**24, 2.0**26, 2.0**28)
    """loss scales of the half-precision gradients"""
    compare: tuple[Path, ...] = ()
    """two files of full_size.py --gradient to compare instead"""
    out: Path | None = None
    """JSON file for the figures"""


def build(settings: TrainConfig, precision: str, rows: int | None, fast: bool, device: torch.device) -> FlowModel:
    """Build a model with a LoRA whose B is not zero, the same for all precisions; rows: for which a fast one is compiled."""
    model = FlowModel(settings.pretrained_model, precision, device)
    model.add_lora(settings.lora_rank, settings.lora_alpha, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for name, parameter in model.named_trainable():
            if "lora_B" in name:
                parameter.copy_(0.002 * torch.randn(parameter.shape, generator=generator))
    model.to_device(text_encoders=False)
    if fast and (failure := model.accelerate(rows, settings.sample.resolution)):
        raise UserError(f"Compiling failed ({failure}), so there is nothing fast to compare.")
    return model


def inputs(model: FlowModel, settings: TrainConfig) -> Rollout:
    """Make trajectories without their velocities: half-precision latents, the same for every model, and text."""
    prompts = load_prompts("tiny_heldout" if settings.pretrained_model == "tiny" else "showcase")[
        : settings.total_pairs_per_epoch
    ]
    with model.text_encoders_loaded():
        text = model.encode(prompts)
    sample = settings.sample
    sigmas, shape = model.sigmas(sample.num_solver_steps, sample.resolution)[:-1], model.latent_shape(sample.resolution)
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 2 * len(prompts), 1, *shape, generator=generator)
    level = sigmas[:, None, None, None]  # [T, 1, 1, 1]
    xs = (level * start + (1 - level) * end).half().float().flatten(0, 1).to(model.device)  # [2P T, C, H, W]
    share = PairShare(0, range(len(prompts)), prompts, text, None)
    return Rollout(share, pair_samples(settings, 0, share.pairs), xs, torch.empty_like(xs), end[:, 0].to(model.device))


@torch.no_grad()
def velocities(model: FlowModel, sample: SampleConfig, plan: BatchPlan, given: Rollout) -> torch.Tensor:
    """Return the model's velocity at every point of the trajectories: [2P T, C, H, W] float32."""
    row, step = (numbers.to(model.device) for numbers in (given.samples.trajectory, given.samples.step))
    sigmas = model.sigmas(sample.num_solver_steps, sample.resolution).to(model.device)
    found = torch.empty_like(given.xs)
    for part in torch.arange(len(step), device=model.device).split(plan.train_batch):
        text = given.share.text.rows(row[part] // 2)
        found[part] = model.velocity(given.xs[part], sigmas[step[part]], text, None, 1.0).float()
    return found


def gradient(model: FlowModel, settings: TrainConfig, rollout: Rollout, count: int, case: tuple[float, float]) -> torch.Tensor:
    """Return the LoRA's gradient of `count` samples of an optimizer step, on the CPU; not finite if it overflows.

    case: spread of the reward, and loss scale.
    """
    spread, scale = case
    generator = torch.Generator().manual_seed(1)
    n = len(rollout.final)
    dR = (spread * torch.randn(n // 2, generator=generator)).repeat_interleave(2) * torch.tensor([0.5, -0.5]).repeat(n // 2)
    dx = 0.1 * torch.randn(rollout.final.shape, generator=generator)
    dropped = torch.zeros(n, dtype=torch.bool, device=model.device)
    differences = Differences(dx.to(model.device), dR.to(model.device), dR, {}, dropped)
    samples = torch.randperm(len(rollout.xs), generator=generator)[:count]
    for parameter in model.trainable():
        parameter.grad = None
    accumulate_gradient(
        EpochData(model, settings, plan_batches(settings, 1), rollout, differences),
        StepSamples(samples, STEP_SAMPLES),
        scale,
        lambda done: False,
    )
    return torch.cat([parameter.grad.flatten().cpu() for parameter in model.trainable()]).double() / scale


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of the true one."""
    return float((found.double() - true.double()).norm() / true.double().norm())


def measure(config: PrecisionConfig, device: torch.device) -> dict:
    """Measure the errors of the eager and the fast model against float32, one model on the device at a time."""
    preset = PRESETS[config.preset]
    settings = dataclasses.replace(preset, total_pairs_per_epoch=config.pairs, max_batch_size=13)
    plan = plan_batches(settings, 1)
    half = "fp16" if device.type == "cuda" else "fp32"
    rows = plan.train_batch if device.type == "cuda" else None
    kinds = {"float32": ("fp32", False, (1.0,)), "eager": (half, False, config.scales), "fast": (half, True, config.scales)}
    given, v, gradients, result = None, {}, {}, {"velocity": {}, "gradient": {}}
    for kind, (precision, fast, scales) in kinds.items():
        model = build(settings, precision, rows, fast, device)
        given = given or inputs(model, settings)
        own = dataclasses.replace(given, velocities=velocities(model, settings.sample, plan, given))
        v[kind] = own.velocities.cpu()
        for spread in config.reward_spreads:
            for scale in scales:
                gradients[kind, spread, scale] = gradient(model, settings, own, config.samples, (spread, scale))
        del model, own
    for kind in ("eager", "fast"):
        result["velocity"][kind] = error(v[kind], v["float32"])
        result["gradient"][kind] = {
            f"reward spread {spread:g}, scale {scale:g}": error(gradients[kind, spread, scale], gradients["float32", spread, 1.0])
            for spread in config.reward_spreads
            for scale in config.scales
        }
    return result | {"micro_batch": plan.train_batch, "velocities": 2 * config.pairs * settings.sample.num_solver_steps}


def main(config: PrecisionConfig) -> None:
    if config.compare:
        one, two = (torch.load(path, weights_only=True) for path in config.compare)
        for name in one:  # a process of several has the first pairs alone
            rows = min(len(one[name]), len(two[name]))
            print(f"relative difference of {name}: {error(two[name][:rows], one[name][:rows]):.2e}")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items() if name != "out"}
    result = {"device": machine, "versions": versions(), "config": values} | measure(config, device)
    print(json.dumps(result, indent=2))
    if config.out is not None:
        config.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_command_line(lambda: main(tyro.cli(PrecisionConfig)))
