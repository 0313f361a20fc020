"""Runs scripts of the project, several at a time, and keeps and reads the logs of training runs."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from learning_tables import LearningRun  # noqa: E402

from fdfo.config.errors import UserError  # noqa: E402
from fdfo.run_folder.find_checkpoint import CONFIG, read_config  # noqa: E402
from fdfo.run_folder.log import LOG, read_log  # noqa: E402
from fdfo.storage.atomic_files import atomic_folder, read_json  # noqa: E402

END = "end.json"  # beside a kept log: seconds of the whole command, and what else a benchmark says of the run


def follow(script: list[object], parallel: int, deadline: float = math.inf, number: int = 0) -> None:
    """Run a script of the project until it ends, or stop it by SIGTERM at the deadline. Raises UserError if it fails.

    parallel: runs at the same time, which share the cores. number: of the run. Where there are several GPUs, runs get them in turn.
    """
    command = [sys.executable, *map(str, script)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // parallel))
    environment = os.environ | {"OMP_NUM_THREADS": threads} | gpu_of(number)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            process.wait(None if math.isinf(deadline) else max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        errors.seek(0)
        if process.returncode not in (0, -15):  # -15 before the run could listen to it
            raise UserError(f"{' '.join(command)} failed: {errors.read()[-2000:]}")


def gpu_of(number: int) -> dict[str, str]:
    """Return the environment that gives a run its GPU, one of those that this process sees."""
    count = torch.cuda.device_count()
    if count < 2:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[number % count]}


def keep(runs: Path, kept: Path, end: dict[str, float]) -> None:
    """Copy what the report needs of a run. Raises UserError if it was stopped before its first epoch."""
    found = list(runs.glob(f"*/{LOG}"))
    if not found:
        raise UserError(f"{kept.name} was stopped before it began: give more --minutes, or fewer runs.")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(kept) as partial:
        for name in (LOG, CONFIG):
            shutil.copy(found[0].with_name(name), partial)
        (partial / END).write_text(json.dumps(end))


def read_run(kept: Path, setting: str, seed: int) -> LearningRun:
    """Read what keep() kept of a run."""
    return LearningRun(setting, seed, read_config(kept), read_json(kept / END), read_log(kept / LOG)[0])
