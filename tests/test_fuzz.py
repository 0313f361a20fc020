"""Whatever stands in files and names that come from others: a UserError or a value, no other exception, no file elsewhere."""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fdfo.config.command_line import parse_train_config
from fdfo.config.errors import UserError
from fdfo.config.options import to_dict
from fdfo.config.plan import plan_batches, plan_images
from fdfo.config.presets import PRESETS
from fdfo.config.tool_options import GenerateConfig
from fdfo.config.train_options import TrainConfig
from fdfo.run_folder.find_checkpoint import find_checkpoint, read_config
from fdfo.run_folder.model_card import Origin, model_card
from fdfo.storage.adapters import read_adapter_config
from fdfo.storage.hub import ADAPTER, check_adapter_files, download_folder, hub_place
from fdfo.storage.prompts import LONGEST_PROMPT, load_prompts

fuzz = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3))
NAMES = st.text(alphabet="abz019._-/:%~ \\\0\n\u00e9\u202e", max_size=40)
CONFIG = to_dict(PRESETS["tiny-published"])
ADAPTER_CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["attn.to_q"], "lora_dropout": 0.0}
PEFT_KEYS = [
    "init_lora_weights",
    "rank_pattern",
    "megatron_config",
    "layer_replication",
    "loftq_config",
    "bias",
    "modules_to_save",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The working folder; what is written into it, but for the files of the test itself, fails the test."""
    (tmp_path / "work").mkdir()
    (tmp_path / "files").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "files"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "work"] and not list((tmp_path / "work").iterdir())


@fuzz
@given(content=st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(content=b"x" * (LONGEST_PROMPT + 1))
@example(content=b"\xef\xbb\xbf\r\n\0\r\n")
def test_prompt_files(folder: Path, content: bytes):
    (folder / "prompts.txt").write_bytes(content)
    with contextlib.suppress(UserError):
        prompts = load_prompts(str(folder / "prompts.txt"))
        assert prompts and all(prompt.strip() and "\n" not in prompt for prompt in prompts)


@fuzz
@given(name=NAMES | st.text(max_size=50))
@example(name="x" * 5000)
@example(name="x" * 5000 + ".txt")
@example(name="\0.txt")
def test_names_of_prompt_sets_and_checkpoints(folder: Path, name: str):
    for read in (load_prompts, find_checkpoint):
        with contextlib.suppress(UserError):
            read(name)


@fuzz
@given(start=st.sampled_from(["hf:", "https://huggingface.co/", "https://huggingface.co/a/b/tree/main/", "https://"]), end=NAMES)
@example(start="hf:", end="../../x/y")
@example(start="https://huggingface.co/", end="a/../tree/main/x")
@example(start="https://huggingface.co/", end="a/b/tree/../x")
@example(start="https://huggingface.co/", end="a/b/tree/main/x/../../../etc")
def test_hub_names(folder: Path, start: str, end: str):
    """The hub is out of reach, so that every name ends with a sentence; those that lead elsewhere do before it is asked."""
    with pytest.raises(UserError) as error:
        download_folder(hub_place(start + end))
    if ".." in (start + end).split("/"):
        assert "not a folder on the hub" in str(error.value) or "points outside" in str(error.value)


def changed(values: dict) -> st.SearchStrategy[dict]:
    """The values with one of them, or one inside the nested ones, replaced by any JSON value."""
    paths = [(key,) for key in values] + [(key, k) for key, inner in values.items() if isinstance(inner, dict) for k in inner]

    def put(path: tuple[str, ...], value: object) -> dict:
        copy = json.loads(json.dumps(values))
        target = copy
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
        return copy

    return st.builds(put, st.sampled_from(paths), JSON)


@fuzz
@given(values=JSON | changed(CONFIG))
@example(values={"sample": {"resolution": 2**40}})
@example(values={"sample": {"num_solver_steps": 10**9}})
@example(values={"timeout_minutes": float("nan")})
def test_config_json(folder: Path, values: object):
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    with contextlib.suppress(UserError):
        config = read_config(path)
        assert isinstance(config, TrainConfig)
        plan_images(GenerateConfig(out=Path("x.png")), config, None)
        plan_batches(parse_train_config([], config), 1)
        model_card(Origin(config.pretrained_model, config, True, None, 1), merged=False)


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 9, "\ufeff{}", '{"a": ' * 50_000, "1" * 10_000, " " * 2**24 + "{}"])
def test_hostile_json_is_refused(folder: Path, text: str):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        read_config(folder / "config.json")
    (folder / "adapter_config.json").write_text(text)
    (folder / ADAPTER).write_bytes(b"")
    with pytest.raises(UserError, match="adapter_config.json"):
        find_checkpoint(str(folder))


@fuzz
@given(values=JSON | changed(ADAPTER_CONFIG | dict.fromkeys(PEFT_KEYS)))
@example(values=ADAPTER_CONFIG | {"megatron_config": {"a": 1}, "megatron_core": "antigravity"})
@example(values=ADAPTER_CONFIG | {"r": 10**9})
@example(values=ADAPTER_CONFIG | {"target_modules": "(a+)+$"})
def test_adapter_config_json(folder: Path, values: object):
    (folder / "adapter_config.json").write_text(json.dumps(values))
    (folder / ADAPTER).write_bytes(b"")
    with contextlib.suppress(UserError):
        check_adapter_files(folder, folder)
        config = read_adapter_config(folder)
        assert config.r <= 1024 and not config.megatron_config and not dataclasses.asdict(config)["layer_replication"]
