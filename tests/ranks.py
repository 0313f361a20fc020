"""Runs a script of the project on several processes, as torchrun would, in a second less for each second of imports.

The processes are forked from one that has imported the libraries and done nothing else. What torchrun itself does (signals,
restarts, errors of its own) is tested with the real one: conftest.torchrun.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTED = [
    "fdfo.method.trainer",
    "rewards.scorers.clip",
    "rewards.scorers.scene",
    "rewards.vlm.judge",
    "fdfo.model.images",
    "tyro",
]


def run_ranks(processes: int, script: str | Path, *arguments: object, timeout: int = 240) -> subprocess.CompletedProcess:
    """Return the largest exit code of the processes, and all that they have printed."""
    os.environ["PYTHONPATH"] = str(ROOT)  # for the process that is forked from, which imports before it gets this one's sys.path
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    command, deadline = [str(ROOT / script), *map(str, arguments)], time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        environments = [os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        ranks = [context.Process(target=run_rank, args=(dict(own), command, folder)) for own in environments]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process for process in ranks if process.exitcode is None]
        for process in late:
            process.kill()
        out, err = ("".join(path.read_text() for path in sorted(Path(folder).glob(f"*.{kind}"))) for kind in ("out", "err"))
    assert not late, f"{len(late)} of {processes} processes did not end: {err[-3000:]}"
    return subprocess.CompletedProcess(command, max(abs(process.exitcode) for process in ranks), out, err)


def run_rank(environment: dict[str, str], command: list[str], folder: str) -> None:
    """Be one of the processes."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for descriptor, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{environment['RANK']}.{kind}", os.O_WRONLY | os.O_CREAT), descriptor)
    torch.set_num_threads(1)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
