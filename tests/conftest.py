"""Shared pieces of the tests: the real tiny model, and command lines run inside the process or under torchrun."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)  # two files are tested at a time

from fdfo.distributed.job import Job  # noqa: E402
from fdfo.distributed.launch import run_command_line  # noqa: E402
from fdfo.model.flow_model import FlowModel  # noqa: E402

CPU = torch.device("cpu")


def normals(*shape: int) -> torch.Tensor:
    """Draw standard normal float64 from the shape alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.fixture
def job() -> Job:
    return Job(0, 1, CPU)


def loaded(name: str) -> FlowModel:
    model = FlowModel(name, "fp32", CPU)
    model.to_device()
    return model


def moved(name: str, precision: str = "fp32", rank: int = 4) -> FlowModel:
    """A model as training has it, with an adapter that does something."""
    model = loaded(name)
    model.add_lora(rank, 2 * rank, 0)
    with torch.no_grad():
        for i, parameter in enumerate(model.trainable()):
            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(i))
    if precision == "bf16":
        model.precision, model.compute_type = "bf16", torch.bfloat16  # which users cannot have on a CPU, being slow there
    model.accelerate(None, 64)
    return model


@pytest.fixture
def tiny() -> FlowModel:
    """The bundled model, without an adapter."""
    return loaded("tiny")


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """run_cli("train", "--preset", "tiny", ...) -> exit code, stdout, stderr; a traceback would fail the test."""

    def run(script: str, *arguments: object) -> tuple[int, str, str]:
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        code = 0
        try:
            run_command_line(module.main)
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    return run


def torchrun(processes: int, *command: object, timeout: int = 240, restarts: int = 0) -> subprocess.CompletedProcess:
    """A script of the project under torchrun, on the CPU."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher.append(f"--max-restarts={restarts}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launcher, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


TINY_RUN = (
    "--preset", "tiny-published", "--total-pairs-per-epoch", 10, "--sample.num-solver-steps", 4, "--eval-prompts", 0,
)  # fmt: skip
FAMILIES = ("sd3", "klein", "z_image")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small model of every family: the bundled one, and random ones."""
    from bases import save, tiny_klein, tiny_z_image

    torch.manual_seed(0)
    random = {"klein": tiny_klein, "z_image": tiny_z_image}
    return {"sd3": "tiny"} | {name: str(save(build(), tmp_path_factory.mktemp(name) / name)) for name, build in random.items()}
