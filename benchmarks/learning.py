"""How far the tiny preset's reward rises: several seeds, side by side, against guidance and true renderings.

python benchmarks/learning.py --out docs/learning_4_minutes.md                                  # two CPU cores
python benchmarks/learning.py --num-epochs 300 --parallel 3 --out docs/learning_300.md          # a GPU
"""

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from fdfo.config.plan import ImageSettings  # noqa: E402
from fdfo.config.presets import PRESETS
from fdfo.evaluation.best_checkpoint import change  # noqa: E402
from fdfo.evaluation.heldout import DEFAULT_PROMPTS  # noqa: E402
from fdfo.evaluation.statistics import Change, evaluation_of  # noqa: E402
from fdfo.method.draw import EVALUATION_SEED  # noqa: E402
from fdfo.model.flow_model import FlowModel  # noqa: E402
from fdfo.model.images import draw_images, encode_for_images  # noqa: E402
from fdfo.storage.prompts import load_prompts  # noqa: E402
from fdfo.tiny.scenes import parse_caption, render  # noqa: E402
from rewards.clip import CLIP_MODELS, ClipScorer  # noqa: E402
from rewards.scene import SceneScorer  # noqa: E402


@dataclass(frozen=True)
class LearningConfig:
    """Train the tiny preset with several seeds and report held-out scores."""

    out: Path
    """Markdown file for the result"""
    seeds: tuple[int, ...] = (6, 7, 8)
    """seeds of the runs"""
    num_epochs: int = PRESETS["tiny"].num_epochs
    """epochs of a run"""
    parallel: int = 1
    """runs at the same time"""
    flags: str = ""
    """further flags for train.py, separated by spaces: --flags="--churn.weight 0.05" """


def references(device: torch.device) -> dict[str, dict[str, float]]:
    """Return held-out scores of the base without and with guidance 3, and of true renderings."""
    sample = PRESETS["tiny"].sample
    prompts = load_prompts("tiny_heldout")[:DEFAULT_PROMPTS]
    scorers = {"scene": SceneScorer(device), "scene_clip": ClipScorer(*CLIP_MODELS["scene_clip"], device)}
    model = FlowModel("tiny", "fp32", device)
    model.to_device()
    text = encode_for_images(model, prompts)
    pictures = {"true renderings": render([parse_caption(p) for p in prompts], torch.Generator().manual_seed(0))}
    for guidance in (1.0, 3.0):
        settings = ImageSettings(sample.resolution, sample.resolution, sample.num_solver_steps, guidance, 32)
        seeds = [EVALUATION_SEED + i for i in range(len(prompts))]
        pictures[f"base, guidance {guidance:g}"] = torch.cat(list(draw_images(model, text, range(len(prompts)), seeds, settings)))
    return {name: {m: float(s.score(prompts, p).mean()) for m, s in scorers.items()} for name, p in pictures.items()}


def run_seed(config: LearningConfig, seed: int) -> dict:
    """Run train.py once; return its log, and the wall-clock seconds of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "--preset", "tiny", "--seed", seed, "--num-epochs", config.num_epochs]
        command += ["--runs-dir", folder, *config.flags.split()]
        start = time.monotonic()
        done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        lines = next(Path(folder).glob("*/training_log.jsonl")).read_text().splitlines()
        return {"seed": seed, "wall": time.monotonic() - start, "log": [json.loads(line) for line in lines]}


def described(rise: Change) -> str:
    return f"{rise.before:.2f} -> {rise.after:.2f} ({rise.difference:+.2f} +- {rise.error:.2f})"


def report(config: LearningConfig, levels: dict, runs: list[dict], device: torch.device) -> str:
    command = f"python benchmarks/learning.py --num-epochs {config.num_epochs} --seeds {' '.join(map(str, config.seeds))}"
    command += f' --flags="{config.flags}"' if config.flags else ""
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [f"`{command}` on {machine}, {config.parallel} run(s) at a time, torch {torch.__version__}.", ""]
    lines += ["| held-out pictures | scene | scene_clip |", "| --- | --- | --- |"]
    lines += [f"| {name} | {row['scene']:.1f} | {row['scene_clip']:.2f} |" for name, row in levels.items()]
    gap = levels["true renderings"]["scene"] - levels["base, guidance 1"]["scene"]
    lines += ["", "| seed | scene before -> after | gap closed | scene_clip before -> after | training seconds | whole command |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for run in runs:
        evaluations = [evaluation_of(line) for line in run["log"] if line["kind"] == "eval"]
        scene, clip = (change(name, evaluations[0], evaluations[-1]) for name in ("scene", "scene_clip"))
        seconds = sum(sum(line["seconds"].values()) for line in run["log"] if line["kind"] == "epoch")
        cells = [
            run["seed"],
            described(scene),
            f"{scene.difference / gap:.0%}",
            described(clip),
            f"{seconds:.0f}",
            f"{run['wall']:.0f} s",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    width = max(1, config.num_epochs // 30)
    lines += ["", f"Training reward, mean of every {width} epoch(s):", ""]
    for run in runs:
        rewards = [line["reward_mean"] for line in run["log"] if line["kind"] == "epoch"]
        means = [sum(rewards[i : i + width]) / len(rewards[i : i + width]) for i in range(0, len(rewards), width)]
        lines.append(f"- seed {run['seed']}: " + " ".join(f"{value:.1f}" for value in means))
    return "\n".join(lines) + "\n"


def main(config: LearningConfig) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    levels = references(device)
    with ThreadPoolExecutor(config.parallel) as pool:
        runs = list(pool.map(lambda seed: run_seed(config, seed), config.seeds))
    text = report(config, levels, runs, device)
    config.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(LearningConfig))
