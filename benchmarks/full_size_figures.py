"""What full_size.py measures beside train.py's own log: the work of a sample, the GPU's ceiling, memory by stage; and its figures."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from fdfo.config.plan import plan_batches  # noqa: E402
from fdfo.config.presets import PRESETS  # noqa: E402
from fdfo.config.train_options import TrainConfig  # noqa: E402
from fdfo.distributed.machine import StageClock  # noqa: E402
from fdfo.model.families.base import Family  # noqa: E402
from fdfo.model.families.registry import find_family  # noqa: E402
from fdfo.model.text import TextEmbeddings  # noqa: E402


def on_meta(name: str) -> Family:
    """Return the model without weights: its family, around a transformer of the true size on the meta device."""
    network = getattr(diffusers, DiffusionPipeline.load_config(name)["transformer"][1])
    config = network.load_config(name, subfolder="transformer")
    with torch.device("meta"):
        transformer = network.from_config(config).requires_grad_(False)
    return find_family(name)(SimpleNamespace(transformer=transformer, vae_scale_factor=8, patch_size=2))


def mean_text(text: TextEmbeddings) -> TextEmbeddings:
    """Return one row, on the meta device, as long as these prompts are in the mean."""
    if text.lengths is None:
        return text.rows([0]).to(torch.device("meta"))
    length = round(text.lengths.double().mean().item())
    return TextEmbeddings(torch.empty(1, length, text.tokens.shape[2], device="meta"), None, torch.tensor([length]))


def count_tflop(name: str, text: TextEmbeddings, resolution: int) -> tuple[float, float]:
    """Return the TFLOP of one sample's forward pass, and of forward and backward with the LoRA, counted by PyTorch on the meta device.

    text: of some prompts of the share.
    """
    family, text = on_meta(name), mean_text(text)
    transformer = family.pipe.transformer
    with torch.device("meta"):
        get_peft_model(transformer, LoraConfig(r=32, lora_alpha=64, target_modules=family.lora_targets(transformer)))
        tokens, pooled = (None if part is None else part.float() for part in (text.tokens, text.pooled))
        x, text = torch.randn(1, *family.latent_shape(resolution)), TextEmbeddings(tokens, pooled, text.lengths)
        with FlopCounterMode(display=False) as forward:
            v = family.velocity(x, torch.ones(1), text)
        with FlopCounterMode(display=False) as backward:
            v.sum().backward()
    return forward.get_total_flops() / 1e12, (forward.get_total_flops() + backward.get_total_flops()) / 1e12


def ceiling(dtype: torch.dtype, seconds: float = 0.0) -> float:
    """Measure TFLOP/s of a matrix product of 8192^3: median of 20 on a cool GPU, or of the last 20 after some seconds.

    A GPU at its power limit lowers its clock, so that what it can do for a moment is not what it can do for an epoch.
    """
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=dtype)
    times, begin = [], time.perf_counter()
    while len(times) < 25 or time.perf_counter() - begin < seconds:
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * 8192**3 / sorted(times[-20:])[10] / 1e9


@contextlib.contextmanager
def peaks_by_stage() -> Iterator[dict[str, dict[str, float]]]:
    """Record the largest memory on the GPU in every stage, 10^9 bytes; `start` is what comes before the first one."""
    peaks, stage = {}, StageClock.stage

    def note(name: str) -> None:
        found = {"allocated": torch.cuda.max_memory_allocated() / 1e9, "reserved": torch.cuda.max_memory_reserved() / 1e9}
        peaks[name] = {kind: max(value, peaks.get(name, found)[kind]) for kind, value in found.items()}
        torch.cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def watched(clock: StageClock, name: str) -> Iterator[None]:
        note("between stages" if peaks else "start")
        with stage(clock, name):
            yield
        note(name)

    StageClock.stage = watched
    try:
        yield peaks
    finally:
        StageClock.stage = stage


def figures(settings: TrainConfig, processes: int, measured: dict, lines: list[dict]) -> dict:
    """Return the figures of rank 0. measured: ceiling, peaks and TFLOP; lines: the run's log."""
    top, peaks = measured["ceiling"], measured["peaks"]
    start, epoch = (next(line for line in lines if line["kind"] == kind) for kind in ("start", "epoch"))
    steps = [line for line in lines if line["kind"] == "step"]
    seconds = {name: value for name, value in epoch["seconds"].items() if name != "checkpoint"}
    (forward, both), steps_done = measured["tflop"], settings.sample.num_solver_steps
    all_steps = PRESETS[settings.preset].sample.num_solver_steps
    plan, pairs = plan_batches(settings, processes), settings.total_pairs_per_epoch // processes
    trained, drawn = plan.samples // processes, settings.train.steps_per_trajectory is not None
    scaled = ("sample",) if drawn else ("sample", "update")  # with the solver steps
    whole = {name: value * (all_steps / steps_done if name in scaled else 1) for name, value in seconds.items()}
    rates = {
        name: {"samples_per_second": samples / seconds[name], "tflop_per_second": samples * work / seconds[name]}
        for name, samples, work in (
            ("sample", 2 * pairs * steps_done, forward),
            ("update", trained, both),
        )
    }
    return {
        "processes": processes,
        "batch_sizes": {"pairs in sampling": plan.sample_batch, "samples in training": plan.train_batch},
        "trained_samples": trained,
        "seconds": seconds, "share_seconds": sum(whole.values()), "seconds_with_all_steps": whole,
        "epoch_gpu_seconds": 432 / pairs * sum(whole.values()),
        "tflop_per_sample": {"forward": forward, "forward and backward": both}, "ceiling_tflop_per_second": top, "rates": rates,
        "share_of_ceiling": {
            name: {kind: rate["tflop_per_second"] / value for kind, value in top.items()} for name, rate in rates.items()
        },
        "compile_seconds": start["compile_seconds"], "ratio_at_unchanged_weights": steps[0]["ratio_first"],
        "evaluation_seconds": [line["seconds"] for line in lines if line["kind"] == "eval"],
        "loss_scale": [step["loss_scale"] for step in steps], "grad_norm": [step["grad_norm"] for step in steps],
        "peak_gb": {kind: max(peak[kind] for peak in peaks.values()) for kind in ("allocated", "reserved")},
        "peak_gb_by_stage": peaks,
        "peak_host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }  # fmt: skip
