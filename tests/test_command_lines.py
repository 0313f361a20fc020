"""train.py, generate.py and metrics.py as a user calls them, with wrong input too."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY_RUN
from hub_server import HubServer
from PIL import Image, ImageFont

from fdfo.config.errors import UserError
from fdfo.report.sheets import caption


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run with guidance 2."""
    folder = tmp_path_factory.mktemp("runs")
    command = ["train.py", *TINY_RUN, "--num-epochs", 1, "--sample.guidance-scale", 2.0, "--runs-dir", folder]
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder / "00000-scene-cfg_2p0"


def test_help_explains_every_flag(run_cli):
    for script, flags in {
        "train": ["--sample.num-solver-steps", "--churn.soft-sd", "--train.kl-weight", "--vlm-use-fsdp", "--preset"],
        "generate": ["--prompt-file", "--grid-cols", "--num-inference-steps"],
        "metrics": ["--num-repeats", "--image-seed", "--vlm-model"],
    }.items():
        code, out, _ = run_cli(script, "--help")
        assert code == 0 and all(flag in out for flag in flags)


WRONG = {
    "missing prompt set": (["train", "--preset", "tiny", "--prompt-set", "nowhere"], "There is no prompt set 'nowhere'"),
    "prompt set to fetch": (["train", "--preset", "tiny", "--prompt-set", "pickscore_train"], "curl -L -o"),
    "unknown preset": (["train", "--preset", "huge"], "--preset"),
    "unknown flag": (["train", "--preset", "tiny", "--epochs", "3"], "--epochs"),
    "no GPU": (["train", "--prompt-set", "tiny"], "--preset tiny"),
    "checkpoint without adapter": (["train", "--preset", "tiny", "--resume-from", "."], "holds no adapter"),
    "not a hub tree": (["generate", "--out", "x.jpg", "--checkpoint", "https://huggingface.co/a/b/commits/main"], "not a folder on the hub"),
    "other host": (["generate", "--out", "x.jpg", "--checkpoint", "https://example.com/a/b/tree/main/c"], "not a folder on the hub"),
    "outside the repository": (["generate", "--out", "x.jpg", "--checkpoint", "hf:a/b/../c"], "not a folder on the hub|outside"),
    "hub unreachable": (
        ["generate", "--preset", "tiny", "--out", "x.jpg", "--checkpoint", "https://huggingface.co/a/b/tree/main/c"], "hf auth login",
    ),
    "too many gradient steps": (["train", "--preset", "tiny", "--gradient-steps-per-epoch", "99999"], "--gradient-steps-per-epoch"),
    "batch size": (["train", "--preset", "tiny", "--train.batch-size", "999"], "--max-batch-size 256"),
    "run folder": (["train", "--preset", "tiny", "--runs-dir", "LICENSE/runs"], "--runs-dir"),
    "reward": (["train", "--preset", "tiny", "--reward-preset", "joy"], "no reward preset 'joy'"),
    "churn number": (["train", "--preset", "tiny", "--churn.mu", "1"], "no effect"),
    "two rewards": (["train", "--preset", "tiny", "--reward-preset", "scene", "--reward-specs", "scene=1"], "no effect beside --reward-specs"),
    "evaluations that are not made": (["train", "--preset", "tiny", "--eval-prompts", "0", "--eval-metrics", "scene"], "--eval-metrics has no effect"),
    "nothing to resume": (["train", "--preset", "tiny", "--resume-from", ""], "--resume-from is empty"),
    "no checkpoint": (["generate", "--preset", "tiny", "--out", "x.jpg", "--checkpoint", ""], "--checkpoint is empty"),
    "seed of images": (["generate", "--preset", "tiny", "--out", "x.jpg", "--seed", "99999999999999999999"], "--seed is 99999999999999999999"),
    "no churn": (["train", "--preset", "tiny", "--churn.weight", "0"], "--churn.weight is 0.0: it should be greater than 0"),
    "foreign captions": (["train", "--preset", "tiny", "--prompt-set", "showcase"], "does not understand the caption"),
    "resolution": (["train", "--preset", "tiny", "--sample.resolution", "72"], "multiple of 16"),
    "held-out metric": (["train", "--preset", "tiny", "--eval-metrics", "beauty"], "no scorer 'beauty'"),
    "held-out prompts": (["train", "--preset", "tiny", "--eval-prompts", "9999"], "tiny_heldout has 512 prompts"),
    "one held-out prompt": (["train", "--preset", "tiny", "--eval-prompts", "1"], "2 or more, or 0"),
    "all held out": (["train", "--preset", "tiny", "--eval-prompt-set", "None", "--eval-prompts", "5000"], "lower --eval-prompts"),
    "metric twice": (["train", "--preset", "tiny", "--eval-metrics", "scene", "scene"], "names a scorer twice"),
    "guidance": (["train", "--preset", "tiny", "--sample.guidance-scale", "0.5"], "--sample.guidance-scale is 0.5: it should be greater than or equal to 1"),
    "run name": (["train", "--preset", "tiny", "--run-name", "a/b"], "--run-name"),
    "out": (["generate", "--preset", "tiny", "--out", "x.gif"], ".jpg or .png"),
    "out folder": (["generate", "--preset", "tiny", "--out", "nowhere/x.jpg"], "There is no folder"),
    "too many prompts": (
        ["metrics", "--preset", "tiny", "--prompt-set", "tiny_heldout", "--num-prompts", "513", "--metrics", "scene"], "512 prompts",
    ),
    "unknown metric": (["metrics", "--preset", "tiny", "--prompt-set", "tiny_heldout", "--metrics", "beauty"], "no scorer 'beauty'"),
}  # fmt: skip


@pytest.mark.parametrize("arguments,says", WRONG.values(), ids=WRONG.keys())
def test_wrong_input_ends_with_one_sentence(run_cli, tmp_path: Path, arguments: list[str], says: str):
    script, *flags = arguments
    if script == "train" and "--runs-dir" not in flags:
        flags += ["--runs-dir", str(tmp_path / "runs")]
    start = time.monotonic()
    code, out, err = run_cli(script, *flags)
    assert code == 2 and any(part in out + err for part in says.split("|"))
    assert time.monotonic() - start < 30 and not (tmp_path / "runs").exists()


def test_a_mistake_leaves_no_traceback_and_exit_code_2():
    command = [sys.executable, "train.py", "--preset", "tiny", "--prompt-set", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: There is no prompt set")


def test_weights_and_biases_is_not_imported_unasked():
    code = "import sys, train, fdfo.method.trainer, fdfo.evaluation.image_sets; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=100).returncode == 0


def test_generate_reads_the_run_and_flags_win(run_cli, run_folder: Path, tmp_path: Path):
    out = tmp_path / "grid.png"
    code, text, _ = run_cli("generate", "--checkpoint", run_folder, "--out", out, "--prompts", "a red circle on a white background",
                            "a blue ring above a green cross on a black background", "--grid-rows", 2)  # fmt: skip
    assert code == 0 and "4 steps, guidance 2.0" in text and "by tiny" in text
    assert Image.open(out).width > 2 * 3 * 64
    code, text, _ = run_cli(
        "generate", "--checkpoint", run_folder, "--out", out, "--guidance-scale", 1, "--num-inference-steps", 3
    )
    assert code == 0 and "3 steps, guidance 1.0" in text and "45 images" in text


def test_generate_is_repeatable_and_seeds_run_over_the_prompts(run_cli, tmp_path: Path):
    """The second prompt's first image has seed 1 x 3: drawn alone with that seed it is the same."""
    prompts = ["a red circle on a white background", "a blue ring on a green background"]
    both, alone = tmp_path / "both.png", tmp_path / "alone.png"
    assert run_cli("generate", "--preset", "tiny", "--out", both, "--prompts", *prompts, "--columns", 1)[0] == 0
    assert run_cli("generate", "--preset", "tiny", "--out", alone, "--prompts", prompts[1], "--seed", 3)[0] == 0
    one, two = np.asarray(Image.open(both)).astype(int), np.asarray(Image.open(alone)).astype(int)
    half = two.shape[0] - 8
    assert np.abs(one[-half:] - two[-half:]).max() <= 1


@pytest.mark.parametrize("script", ["generate", "metrics"])
def test_a_hub_folder_is_downloaded_alone_and_then_offline(run_folder: Path, tmp_path: Path, script: str):
    folder = run_folder / "checkpoints" / "epoch-0000001"
    files = {
        f"some-folder/epoch-0000001/{name}": (folder / name).read_bytes()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    files["some-folder/epoch-0000002/adapter_model.safetensors"] = files["README.md"] = b"not to be fetched"
    url = "https://huggingface.co/someone/adapters/tree/main/some-folder/epoch-0000001"
    flags = {
        "generate": ["--prompts", "a red ring on a blue background", "--out", "x.jpg"],
        "metrics": ["--prompt-set", "tiny_heldout", "--num-prompts", "3", "--metrics", "scene", "--out", "x.json"],
    }[script]
    command = [sys.executable, str(ROOT / f"{script}.py"), "--preset", "tiny", "--checkpoint", url, *flags]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    with HubServer("someone/adapters", files) as server:
        environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        assert set(server.served) == {name for name in files if "epoch-0000001" in name}
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_captions_are_wrapped_and_long_words_cut():
    font = ImageFont.load_default(13)
    for text in ("one two three " * 8, "x" * 100, "", "short"):
        lines = caption(text, font, 100)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(font.getlength(line) <= 100 for line in lines)
    assert len(caption("x" * 5000, font, 100)) == 12


def test_user_errors_are_value_errors():
    assert issubclass(UserError, ValueError)
