"""The published way: its command lines, its hub names, and the images and scores of --as-published."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hub_server import HubServer
from PIL import Image
from ranks import run_ranks
from test_prompt_sets import hpdv2
from test_training import small

sys.path.insert(0, str(ROOT / "benchmarks"))

from published_table import table

import fdfo.evaluation.image_sets
from fdfo.config.command_line import parse_generate_config, parse_metrics_config, parse_train_config
from fdfo.config.errors import UserError
from fdfo.distributed.job import Job
from fdfo.evaluation.image_folder import find_images
from fdfo.method.trainer import train
from fdfo.model.images import quantised, quantised_as_published
from fdfo.storage.hub import HPDV2, hub_place
from fdfo.storage.prompts import choose_prompts, load_prompts
from fdfo.tiny import SCENE_CLIP
from rewards.registry import build_scorers
from rewards.scorers.clip import CLIP_MODELS, PUBLISHED_PROCESSORS

HUB = "https://huggingface.co/nvidia/finite-difference-flow-optimization"
FOLDER = "fdfo-combined-reward-cfg-2.0/epoch-0000001"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
DRAW = ("--preset", "tiny", "--prompt-set", "tiny_heldout", "--num-inference-steps", 3, "--num-prompts", 5, "--num-repeats", 2,
        "--image-seed", 100, "--metrics", "scene")  # fmt: skip


# -- command lines and hub names


def test_the_experiment_runs_the_readmes_commands_and_ends_with_a_table(tmp_path: Path):
    """benchmarks/published.sh --rehearse is run by hand: it takes minutes."""
    script, readme = ((ROOT / name).read_text() for name in ("benchmarks/published.sh", "README.md"))
    (fetch,) = (line.strip() for line in readme.splitlines() if "pickscore_train.txt https" in line)
    assert fetch in script and "benchmarks/published.sh" in readme
    assert subprocess.run(["bash", ROOT / "benchmarks/published.sh", "--rehears"], capture_output=True).returncode == 2
    with pytest.raises(UserError, match="run benchmarks/published.sh first"):
        table(tmp_path)
    for epoch, mean in ((20, 21.5), (100, 22.4)):
        result = {"epoch": epoch, "metrics": {"pickscore": {"mean": mean, "standard_error": 0.05}}}
        (tmp_path / f"metrics-pickscore_train-{epoch}.json").write_text(json.dumps({"results": [result]}))
    assert table(tmp_path).splitlines()[2] == "| pickscore | 21.5000 +- 0.0500 | 22.4000 +- 0.0500 | 22.4704 |"


def test_the_published_command_lines_parse():
    url = f"{HUB}/tree/main/{FOLDER}"
    assert parse_generate_config(["--checkpoint", url]).out == Path("out.jpg")
    defaults = parse_metrics_config(["--checkpoint", url])
    assert (defaults.prompt_set, defaults.metrics) == ("hpdv2", ("pickscore",))
    for line in (
        "--prompt-set pickscore_train --num-prompts 4096 --num-repeats 1 --metrics pickscore vlm_alignment",
        "--prompt-set hpdv2 --num-prompts 3200 --num-repeats 4 --metrics hpsv2 clip_h14 clip_l14 dreamsim_diversity",
    ):
        assert parse_metrics_config(["--checkpoint", url, *line.split()]).num_prompts >= 3200
    for preset in ("pickscore", "vlm_alignment", "combined"):
        for guidance in ("1.0", "2.0", "4.5"):
            parse_train_config(["--reward-preset", preset, "--sample.guidance-scale", guidance, "--resume-from", url])


@pytest.mark.parametrize(
    "name,path,revision",
    [
        (HUB, "", "main"),
        (f"{HUB}/", "", "main"),
        (f"{HUB}/tree/v1.0", "", "v1.0"),
        (f"{HUB}/tree/main/", "", "main"),
        (f"{HUB}/tree/main/{FOLDER}", FOLDER, "main"),
        ("hf:nvidia/finite-difference-flow-optimization", "", "main"),
        (f"hf:nvidia/finite-difference-flow-optimization/{FOLDER}/", FOLDER, "main"),
    ],
)
def test_hub_names(name: str, path: str, revision: str):
    place = hub_place(name)
    assert (place.repository, place.revision) == ("nvidia/finite-difference-flow-optimization", revision)
    assert str(place.folder) == (path or ".") and str(place.path) == "/".join([place.repository, path]).strip("/")


@pytest.mark.parametrize("name", ["hf:a", "hf:a/b/../c", "hf:a/..", "hf:a/b//c", f"{HUB}/commits/main", f"{HUB}/tree/main/./x"])
def test_names_that_lead_nowhere_are_refused(name: str):
    with pytest.raises(UserError, match="not a folder on the hub|points outside"):
        hub_place(name)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(Job(0, 1, torch.device("cpu")), small(tmp_path_factory.mktemp("runs"))).folder


FIND = """
import json, sys
from fdfo.run_folder.find_checkpoint import find_checkpoint, trained_guidance
found = [find_checkpoint(name) for name in sys.argv[1:]]
print(json.dumps([[c.label, c.run_name, trained_guidance(c)] for c in found]))
"""


def test_every_hub_name_loads_from_a_server(run_folder: Path, tmp_path: Path):
    """Adapters at the root and in a folder; the guidance comes from the repository's name or the folder's."""
    adapter = {name: (run_folder / "checkpoints" / "epoch-0000001" / name).read_bytes() for name in ADAPTER_FILES}
    files = adapter | {f"{FOLDER}/{name}": content for name, content in adapter.items()} | {"README.md": b"not to be fetched"}
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    url = "https://huggingface.co/someone/lora-no-cfg"
    names = [url, f"{url}/tree/main", f"{url}/tree/main/{FOLDER}", "hf:someone/lora-no-cfg", f"hf:someone/lora-no-cfg/{FOLDER}"]
    root, inside = ["someone/lora-no-cfg", "someone", 1.0], [FOLDER, "fdfo-combined-reward-cfg-2.0", 2.0]
    with HubServer("someone/lora-no-cfg", files) as server:
        environment["HF_ENDPOINT"] = server.url
        done = subprocess.run([sys.executable, "-c", FIND, *names], env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [root, root, inside, root, inside]
        assert set(server.served) == set(ADAPTER_FILES)  # the folder's files have the same content, which is cached
        command = [sys.executable, str(ROOT / "generate.py"), "--preset", "tiny", "--checkpoint", url, "--prompts", "a red ring"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0 and "images: out.jpg" in done.stdout, done.stderr
    assert Image.open(tmp_path / "out.jpg").width > 64


# -- images


def drawn(run_cli, monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: object) -> tuple[list, list, np.ndarray, dict]:
    """The rows and seeds that metrics.py draws, its images [5, 2, H, W, 3], and its JSON."""
    seen, real = [], fdfo.evaluation.image_sets.draw_images
    monkeypatch.setattr(
        fdfo.evaluation.image_sets, "draw_images", lambda *arguments: seen.append(arguments[2:4]) or real(*arguments)
    )
    code, out, err = run_cli("metrics", *DRAW, *flags, "--save-images", folder, "--out", f"{folder}.json")
    monkeypatch.undo()
    assert code == 0, err
    return *seen[0], images_in(folder), json.loads(Path(f"{folder}.json").read_text())


def images_in(folder: Path) -> np.ndarray:
    numbers = [chosen.number for chosen in choose_prompts(load_prompts("tiny_heldout"), 5, 0)]
    entries = {entry.text: entry.files for entry in find_images(folder, "tiny_heldout")}
    texts = [load_prompts("tiny_heldout")[number] for number in numbers]
    return np.array([[np.asarray(Image.open(file)).astype(int) for file in entries[text]] for text in texts])


def test_seeds_are_those_of_the_published_processes(run_cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """With W processes prompt i is number i // W of its own. By hand: 5 prompts, 2 repeats, first seed 100."""
    rows, seeds, plain, _ = drawn(run_cli, monkeypatch, tmp_path / "plain")
    assert (rows, seeds) == ([0, 0, 1, 1, 2, 2, 3, 3, 4, 4], [100, 101, 102, 103, 104, 105, 106, 107, 108, 109])
    one = drawn(run_cli, monkeypatch, tmp_path / "one", "--as-published", "--published-processes", 1)
    assert one[:2] == (rows, seeds) and one[3]["results"][0]["pictures"]["published_processes"] == 1
    assert set(np.unique(one[2] - plain)) <= {0, 1} and (one[2] != plain).mean() < 1e-3  # float32 here: halves alone
    two = drawn(run_cli, monkeypatch, tmp_path / "two", "--as-published", "--published-processes", 2)
    assert two[:2] == (rows, [100, 101, 100, 101, 102, 103, 102, 103, 104, 105])
    assert np.array_equal(two[2][0], one[2][0]) and all((two[2][i] != one[2][i]).mean() > 0.1 for i in range(1, 5))
    eight = drawn(run_cli, monkeypatch, tmp_path / "eight", "--as-published")
    assert eight[1] == [100, 101] * 5 and eight[3]["results"][0]["pictures"]["published_processes"] == 8
    assert eight[3]["config"]["as_published"]
    done = run_ranks(2, "metrics.py", *DRAW, "--as-published", "--published-processes", 2, "--save-images", tmp_path / "again")
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.abs(images_in(tmp_path / "again") - two[2]).max() <= 1


def test_the_published_rounding():
    """By hand, bfloat16 having 8 bits: 0.75 is 191.25, rounded to 191; 191.5 lies between 191 and 192, and the even one is 192."""
    values = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.bfloat16)
    assert quantised_as_published(values).tolist() == [0, 64, 128, 192, 255]
    assert quantised(values).tolist() == [0, 64, 128, 191, 255]
    assert quantised_as_published(values.float()).tolist() == quantised(values).tolist()
    images = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    higher = quantised_as_published(images).int() - quantised(images).int()
    assert set(higher.unique().tolist()) == {0, 1} and 0.2 < higher.float().mean() < 0.4


# -- scores


def test_pickscore_takes_its_own_processor_as_published(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = tmp_path / "own"
    shutil.copytree(SCENE_CLIP, own)
    assert PUBLISHED_PROCESSORS == {"pickscore": CLIP_MODELS["pickscore"][0]}
    monkeypatch.setitem(CLIP_MODELS, "pickscore", (str(SCENE_CLIP), str(SCENE_CLIP)))
    monkeypatch.setitem(PUBLISHED_PROCESSORS, "pickscore", str(own))
    ours = build_scorers(["pickscore"], job)["pickscore"]
    published = build_scorers(["pickscore", "scene_clip"], job, as_published=True)
    assert ours.description.endswith(f"processor {SCENE_CLIP}")
    assert published["pickscore"].description.endswith(f"processor {own}")
    assert published["scene_clip"].description.endswith(f"processor {SCENE_CLIP}")


PROMPTS = """
import json
from fdfo.storage.hub import load_prompt_set
print(json.dumps(load_prompt_set("hpdv2", as_published=True)))
"""


def test_the_prompts_of_hpdv2_are_the_files_strings(tmp_path: Path):
    files = hpdv2()
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    with HubServer(f"datasets/{HPDV2}", files) as server:
        environment["HF_ENDPOINT"] = server.url
        done = subprocess.run([sys.executable, "-c", PROMPTS], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [prompt for content in files.values() for prompt in json.loads(content)]
    assert "\n" in json.loads(done.stdout)[0]


WRONG = {
    "processes alone": (["--published-processes", "2"], "--published-processes has no effect without --as-published"),
    "images": (["--images", "x", "--as-published", "--published-processes", "2"], "--published-processes has no effect with --images"),
    "no effect": (["--images", "x", "--as-published", "--prompt-set", "tiny", "--metrics", "scene"], "on pickscore and on hpdv2 alone"),
    "no process": (["--as-published", "--published-processes", "0"], "--published-processes is 0"),
}  # fmt: skip


@pytest.mark.parametrize("flags,says", WRONG.values(), ids=WRONG.keys())
def test_flags_without_effect_are_refused(flags: list[str], says: str):
    with pytest.raises(UserError, match=says):
        parse_metrics_config(flags)
