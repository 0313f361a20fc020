"""Tunes FDFO and the rivals with the same budget, then runs the best setting of each with other seeds. rival_page.py writes the page.

python benchmarks/rivals/tune.py --logs rival_logs --methods flow_grpo --parallel 8 --minutes 8     # 8 settings, one seed
python benchmarks/rivals/tune.py --logs rival_logs --final --parallel 9 --minutes 8.5               # the best of each, three seeds
python benchmarks/rivals/rival_page.py --logs rival_logs --out docs/rivals.md

FDFO with changes to it, which METHODS do not include; variants_page.py writes their page:

python benchmarks/rivals/tune.py --logs rival_logs --methods fdfo_variants --parallel 8 --minutes 8
python benchmarks/rivals/tune.py --logs rival_logs --methods fdfo_variants --final --only defaults branches-8 --parallel 6
python benchmarks/rivals/variants_page.py --logs rival_logs --out docs/gap.md

Where there are several GPUs, the runs are dealt to them one by one. A run whose whole log is in the folder is not run again, so
that a call that ran out of time can be repeated. A run stopped by --minutes leaves the log that it has, and begins again in the
next call. The best setting is that with the highest held-out scene score, averaged over the evaluations after epoch 0. The final
seeds are others than those of the tuning.
"""

import json
import math
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import tyro

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from learning_tables import LearningRun  # noqa: E402
from run_logs import END, follow, keep, read_run  # noqa: E402
from settings import METHODS, SCRIPTS, SETTINGS, Method  # noqa: E402

from fdfo.config.errors import UserError  # noqa: E402
from fdfo.distributed.launch import run_command_line  # noqa: E402
from fdfo.run_folder.log import LOG  # noqa: E402


@dataclass(frozen=True)
class TuneConfig:
    """Run FDFO and the rivals on the tiny preset."""

    logs: Path
    """folder that keeps the runs' logs"""
    methods: tuple[Method, ...] = METHODS
    """what to run"""
    final: bool = False
    """run the best setting of each method, or those of --only, with the final seeds, instead of all settings with the seed of the
    tuning"""
    only: tuple[str, ...] = ()
    """names of the settings to run"""
    tuning_epochs: int = 100
    """epochs of a run of the tuning"""
    final_epochs: int = 200
    """epochs of a final run"""
    tuning_seeds: tuple[int, ...] = (6,)
    """seeds of the tuning"""
    final_seeds: tuple[int, ...] = (7, 8, 9)
    """seeds of the final runs"""
    parallel: int = 1
    """runs at the same time"""
    minutes: float | None = None
    """stop the runs after this time"""
    flags: str = "--eval-every 10 --max-batch-size 1024"
    """flags of all runs"""


@dataclass(frozen=True)
class Planned:
    """A run to make."""

    method: Method
    setting: str
    seed: int
    epochs: int
    kept: Path  # folder for its log


def kept_runs(folder: Path, method: str) -> list[LearningRun]:
    """Return a method's runs in logs/tuning or logs/final, in the order of its settings."""
    paths = sorted((folder / method).glob("*/" + END), key=lambda path: order_of(method, path.parent.name))
    runs = []
    for kept in (path.parent for path in paths):
        setting, _, seed = kept.name.rpartition("-seed-")
        runs.append(read_run(kept, setting, int(seed)))
    return runs


def order_of(method: str, name: str) -> tuple[int, int]:
    setting, _, seed = name.rpartition("-seed-")
    return list(SETTINGS[method]).index(setting), int(seed)


def whole(run: LearningRun) -> bool:
    """Return whether a run was evaluated after its last epoch."""
    return run.config.num_epochs in run.curve()


def quality(run: LearningRun) -> float:
    """Return a run's held-out scene score, averaged over the evaluations after epoch 0; -inf for one that broke."""
    return fmean(score for epoch, score in run.curve().items() if epoch) if whole(run) else -math.inf


def best_setting(logs: Path, method: str) -> str:
    """Return the method's best setting. Raises UserError before its tuning is done."""
    runs = kept_runs(logs / "tuning", method)
    missing = set(SETTINGS[method]) - {run.setting for run in runs if whole(run) or run.end.get("broke")}
    if missing:
        raise UserError(f"The tuning of {method} lacks {', '.join(sorted(missing))}: run it first, without --final.")
    return max(SETTINGS[method], key=lambda name: fmean(quality(run) for run in runs if run.setting == name))


def chosen_settings(config: TuneConfig, method: Method) -> list[str]:
    """Return the settings of a method to run. Raises UserError for a name in --only that it lacks."""
    if unknown := set(config.only) - set(SETTINGS[method]):
        raise UserError(
            f"{method} has no setting {', '.join(sorted(unknown))}: give --only some of {', '.join(SETTINGS[method])}."
        )
    if config.only:
        return list(config.only)
    return [best_setting(config.logs, method)] if config.final else list(SETTINGS[method])


def planned_runs(config: TuneConfig) -> list[Planned]:
    """Return the runs to make, but for those that are there already."""
    part, epochs = ("final", config.final_epochs) if config.final else ("tuning", config.tuning_epochs)
    planned = []
    for seed in config.final_seeds if config.final else config.tuning_seeds:
        for method in config.methods:
            for setting in chosen_settings(config, method):
                kept = config.logs / part / method / f"{setting}-seed-{seed}"
                planned.append(Planned(method, setting, seed, epochs, kept))
    return [one for one in planned if not is_done(one)]


def is_done(planned: Planned) -> bool:
    """Return whether the log of a run is there, up to its last epoch or to where it broke."""
    if not planned.kept.exists():
        return False
    run = read_run(planned.kept, planned.setting, planned.seed)
    return planned.epochs in run.curve() or bool(run.end.get("broke"))


def make_run(config: TuneConfig, planned: Planned, deadline: float, number: int) -> None:
    """Make a run and keep its log; that of a run whose numbers stop being finite ends there. number: of the run, for its GPU."""
    if time.monotonic() > deadline:
        print(f"{planned.kept}: not begun", flush=True)
        return
    with tempfile.TemporaryDirectory() as runs:
        numbers = ["--seed", planned.seed, "--num-epochs", planned.epochs]
        flags = [*config.flags.split(), *SETTINGS[planned.method][planned.setting].split()]
        start, broke = time.monotonic(), ""
        try:
            follow([*SCRIPTS[planned.method], runs, *numbers, *flags], config.parallel, deadline, number)
        except UserError as error:
            broke = str(error)
        if not list(Path(runs).glob(f"*/{LOG}")) or (broke and "finite" not in broke):
            print(f"{planned.kept}: {broke or 'stopped before it began'}", flush=True)
            return
        shutil.rmtree(planned.kept, ignore_errors=True)
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        keep(Path(runs), planned.kept, {"wall": time.monotonic() - start, "broke": broke, "machine": machine})
    run = read_run(planned.kept, planned.setting, planned.seed)
    print(f"{planned.kept}: {json.dumps({e: round(s, 1) for e, s in run.curve().items()})} {broke[-300:]}", flush=True)


def main(config: TuneConfig) -> None:
    deadline = time.monotonic() + (60 * config.minutes if config.minutes is not None else math.inf)
    planned = planned_runs(config)
    print(f"{len(planned)} runs to make, {config.parallel} at a time", flush=True)
    with ThreadPoolExecutor(config.parallel) as pool:
        list(pool.map(lambda number, one: make_run(config, one, deadline, number), range(len(planned)), planned))


if __name__ == "__main__":
    run_command_line(lambda: main(tyro.cli(TuneConfig)))
