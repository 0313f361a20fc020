"""How far the reward of the preset tiny-published rises, and at what cost: settings side by side, several seeds each, against true renderings.

python benchmarks/learning.py --out docs/learning_4_minutes.md                                  # two CPU cores
python benchmarks/learning.py --num-epochs 300 --parallel 3 --out docs/learning_300.md          # a GPU

Subsets of the update's samples, 12 runs at a time on one GPU, with the logs kept; settings of a later call join those that are there:

python benchmarks/learning.py --out subsets.md --logs subsets --num-epochs 200 --parallel 12 --minutes 9 \\
    --flags="--eval-every 10 --max-batch-size 1024 --save-freq 1000" --settings all \\
    "quarter=--train.steps-per-trajectory 2" "eighth=--train.steps-per-trajectory 2 --train.branches one" \\
    "sixteenth=--train.steps-per-trajectory 1 --train.branches one"

More pairs or more epochs for the same cost, and fewer solver steps scored on the full grid:

python benchmarks/learning.py --out pairs.md --equal-cost --num-epochs 100 --settings all \
    "epochs=--train.steps-per-trajectory 2 --train.branches one" \
    "pairs=--train.steps-per-trajectory 2 --train.branches one --total-pairs-per-epoch 228"
python benchmarks/learning.py --out grid.md --grid 16 --settings "16 steps=--sample.num-solver-steps 16" "8 steps"

The cost of a run counts forwards of the network, as the full-size model takes them: 1 for a solver step of a trajectory, 2.2 for a
sample of the update. Evaluations, rewards and start are left out of it. The plot beside --out shows held-out score against cost.
"""

import json
import math
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

from learning_tables import LearningRun, cost_of_epoch, plot, tables  # noqa: E402
from run_logs import follow, keep, read_run  # noqa: E402

from fdfo.config.command_line import parse_train_config  # noqa: E402
from fdfo.config.errors import UserError  # noqa: E402
from fdfo.config.plan import ImageSettings  # noqa: E402
from fdfo.config.presets import PRESETS  # noqa: E402
from fdfo.distributed.launch import run_command_line  # noqa: E402
from fdfo.evaluation.heldout import DEFAULT_PROMPTS  # noqa: E402
from fdfo.method.evaluate import EVALUATION_SEED  # noqa: E402
from fdfo.model.flow_model import FlowModel  # noqa: E402
from fdfo.model.images import draw_images, encode_for_images  # noqa: E402
from fdfo.run_folder.find_checkpoint import all_checkpoints  # noqa: E402
from fdfo.storage.prompts import load_prompts  # noqa: E402
from fdfo.tiny.scenes import parse_caption, render  # noqa: E402
from rewards.scorers.clip import CLIP_MODELS, ClipScorer  # noqa: E402
from rewards.scorers.scene import SceneScorer  # noqa: E402


@dataclass(frozen=True)
class LearningConfig:
    """Train tiny-published with several settings and seeds, and report held-out scores and cost."""

    out: Path
    """Markdown file for the result; the plot goes beside it"""
    settings: tuple[str, ...] = ("defaults",)
    """what to compare, the first against all others: a name, or NAME=FLAGS of train.py, separated by spaces"""
    seeds: tuple[int, ...] = (6, 7, 8)
    """seeds of the runs"""
    num_epochs: int = PRESETS["tiny-published"].num_epochs
    """epochs of a run; --num-epochs among the flags of a setting wins"""
    equal_cost: bool = False
    """give each setting as many epochs as cost what --num-epochs of the first setting cost"""
    grid: int | None = None
    """also score each run's last checkpoint with that many solver steps, the same for settings that train with different ones"""
    parallel: int = 1
    """runs at the same time"""
    flags: str = ""
    """further flags for train.py in all settings, separated by spaces: --flags="--churn.weight 0.05" """
    logs: Path | None = None
    """folder that keeps the runs' logs; a run that is in it is not run again"""
    minutes: float | None = None
    """stop the runs after this time, and report how far they came"""
    target: float = 92.0
    """held-out scene score to report the cost of"""


def references(device: torch.device) -> dict[str, dict[str, float]]:
    """Return held-out scores of the base without and with guidance 3, and of true renderings."""
    sample = PRESETS["tiny-published"].sample
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


def run_seed(config: LearningConfig, folder: Path, job: tuple[str, int], deadline: float, number: int) -> LearningRun:
    """Run train.py once, for (setting, seed) unless its log is in the folder; read the log. number: of the run, for its GPU."""
    setting, seed = job
    name, _, flags = setting.partition("=")
    kept = folder / f"{name}-{seed}"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as runs:
            command = ["train.py", "--runs-dir", runs, "--seed", seed, "--num-epochs", epochs_of(config, setting)]
            start = time.monotonic()
            follow([*command, *train_flags(config, setting)], config.parallel, deadline, number)
            end = {"wall": time.monotonic() - start}
            if config.grid is not None:
                end["grid"] = score_on_grid(config, Path(runs))
            keep(Path(runs), kept, end)
    return read_run(kept, name, seed)


def train_flags(config: LearningConfig, setting: str) -> list[str]:
    return ["--preset", "tiny-published", *config.flags.split(), *setting.partition("=")[2].split()]


def epochs_of(config: LearningConfig, setting: str) -> int:
    """Return the epochs of a setting's runs."""
    if not config.equal_cost:
        return config.num_epochs
    first, own = (cost_of_epoch(parse_train_config(train_flags(config, one))).total for one in (config.settings[0], setting))
    return round(config.num_epochs * first / own)


def score_on_grid(config: LearningConfig, runs: Path) -> float:
    """Return the held-out scene score of a run's newest checkpoint, drawn by metrics.py with config.grid solver steps."""
    out, (run,) = runs / "grid.json", runs.glob("0*")
    command = ["metrics.py", "--checkpoint", all_checkpoints(run)[-1], "--prompt-set", "tiny_heldout", "--metrics", "scene"]
    command += ["--num-prompts", DEFAULT_PROMPTS, "--num-repeats", 2, "--num-inference-steps", config.grid, "--batch-size", 256]
    follow([*command, "--out", out], config.parallel)
    return json.loads(out.read_text())["results"][0]["metrics"]["scene"]["mean"]


def main(config: LearningConfig) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [setting.partition("=")[0] for setting in config.settings]
    if len(set(names)) < len(names):
        raise UserError("--settings gives a name twice: choose another.")
    deadline = time.monotonic() + (60 * config.minutes if config.minutes is not None else math.inf)
    jobs = [(setting, seed) for seed in config.seeds for setting in config.settings]  # so that the first seeds end first
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(config.parallel) as pool:
        folder = config.logs or Path(temporary)
        runs = list(pool.map(lambda number, job: run_seed(config, folder, job, deadline, number), range(len(jobs)), jobs))
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    command = f"python benchmarks/learning.py {' '.join(map(quoted, sys.argv[1:]))}"
    head = f"`{command}` on {machine}, {config.parallel} run(s) at a time, torch {torch.__version__}."
    runs.sort(key=lambda run: (names.index(run.setting), run.seed))
    image = config.out.with_suffix(".png")
    plot(image, runs, config.target)
    text = "\n".join(
        [head, "", f"![Held-out score against cost]({image.name})", "", tables(runs, references(device), config.target)]
    )
    config.out.write_text(text, encoding="utf-8")
    print(text)


def quoted(word: str) -> str:
    return f'"{word}"' if " " in word else word


if __name__ == "__main__":
    run_command_line(lambda: main(tyro.cli(LearningConfig)))
