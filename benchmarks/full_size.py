"""One rank's share of an 8-GPU epoch at full size with random weights, through train.py's own stages: fast, or the published way.

python benchmarks/random_hub.py --out /dev/shm/random_hub
export HF_HOME=/dev/shm/random_hub HF_HUB_OFFLINE=1
python benchmarks/full_size.py --out fast.json
python benchmarks/full_size.py --eager --out eager.json

The whole epoch (432 pairs) is 8 times the default 54 pairs. --eager runs the same stages without compiling, with frozen
weights in bfloat16 under autocast, diffusers' attention with PEFT's layers, the library's vision attention, and that loop's
batch sizes. Both include what is done once an epoch: encoding the prompts, with the text encoders brought from the host.
"""

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import rewards.vlm  # noqa: E402
from fdfo.config import SD35_MEDIUM, TrainConfig  # noqa: E402
from fdfo.distributed import start_job  # noqa: E402
from fdfo.logger import versions  # noqa: E402
from fdfo.model import LORA_TARGETS, FlowModel  # noqa: E402
from fdfo.plan import plan_batches  # noqa: E402
from fdfo.trainer import train  # noqa: E402


@dataclass(frozen=True)
class FullSizeConfig:
    """Time one rank's share of an epoch."""

    pairs: int = 54
    """pairs of the share"""
    eager: bool = False
    """the published way instead of the fast one"""
    max_batch_size: int | None = None
    """largest micro-batch (13; 9 for --eager, as that loop has it on 8 GPUs)"""
    reward_preset: str = "combined"
    """scorers of the share"""
    out: Path | None = None
    """JSON file for the figures"""


def count_tflop() -> tuple[float, float]:
    """TFLOP of one sample's forward, and of forward and backward with the LoRA, counted by PyTorch on the meta device."""
    config = SD3Transformer2DModel.load_config(SD35_MEDIUM, subfolder="transformer")
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(config).requires_grad_(False)
        targets = [f"attn.{target}" for target in LORA_TARGETS]
        get_peft_model(transformer, LoraConfig(r=32, lora_alpha=64, target_modules=targets))
        x, tokens, pooled = torch.randn(1, 16, 64, 64), torch.randn(1, 205, 4096), torch.randn(1, 2048)
        with FlopCounterMode(display=False) as forward:
            v = transformer(x, tokens, pooled, torch.ones(1), return_dict=False)[0]
        with FlopCounterMode(display=False) as backward:
            v.sum().backward()
    return forward.get_total_flops() / 1e12, (forward.get_total_flops() + backward.get_total_flops()) / 1e12


def ceiling() -> float:
    """TFLOP/s of a float16 matrix product of 8192^3, median of 20."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.float16)
    times = []
    for _ in range(25):
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * 8192**3 / sorted(times[5:])[10] / 1e9


def main(config: FullSizeConfig) -> None:
    if config.eager:
        FlowModel.accelerate = lambda self, compiled_rows, resolution: None
        rewards.vlm.use_varlen_attention = lambda visual, device: None
    with start_job() as job, tempfile.TemporaryDirectory() as folder:
        top = ceiling()
        run_config = TrainConfig(
            prompt_set="showcase", total_pairs_per_epoch=config.pairs, num_epochs=1, runs_dir=Path(folder), compile=not config.eager,
            max_batch_size=config.max_batch_size or (9 if config.eager else 13), reward_preset=config.reward_preset, eval_prompts=0,
        )  # fmt: skip
        run = train(job, run_config, None)
        start, *steps, epoch = [json.loads(line) for line in run.log.path.read_text().splitlines()]
    seconds = {name: value for name, value in epoch["seconds"].items() if name != "checkpoint"}
    forward, both = count_tflop()
    samples = 2 * config.pairs * run_config.sample.num_solver_steps
    rates = {
        name: {"samples_per_second": samples / seconds[name], "tflop_per_second": samples * work / seconds[name]}
        for name, work in (("sample", forward), ("update", both))
    }
    plan = plan_batches(run_config, 1)
    result = {
        "device": torch.cuda.get_device_name(), "config": asdict(config) | {"out": str(config.out)}, "versions": versions(),
        "batch_sizes": {"pairs in sampling": plan.sample_batch, "samples in training": plan.train_batch},
        "seconds": seconds, "share_seconds": sum(seconds.values()),
        "epoch_gpu_seconds": 432 / config.pairs * sum(seconds.values()),
        "tflop_per_sample": {"forward": forward, "forward and backward": both}, "ceiling_tflop_per_second": top, "rates": rates,
        "share_of_ceiling": {name: rate["tflop_per_second"] / top for name, rate in rates.items()},
        "compile_seconds": start["compile_seconds"], "ratio_at_unchanged_weights": steps[0]["ratio_first"],
        "loss_scale": [step["loss_scale"] for step in steps], "grad_norm": [step["grad_norm"] for step in steps],
        "peak_gib": {"allocated": torch.cuda.max_memory_allocated() / 2**30, "reserved": torch.cuda.max_memory_reserved() / 2**30},
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    if config.out is not None:
        config.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(FullSizeConfig))
