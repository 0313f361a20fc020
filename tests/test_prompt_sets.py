"""Prompt sets: what their page says of them, the fetching of hpdv2, and a pickscore_train that is not the published file."""

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hub_server import HubServer

import fdfo.storage.prompts
from fdfo.config.errors import UserError
from fdfo.storage.hub import HPDV2, HPDV2_STYLES
from fdfo.storage.prompts import (
    PICKSCORE_COMMAND,
    PROMPT_SETS,
    PUBLISHED_SHA256,
    SUFFIXES,
    Prompt,
    find_prompts,
    hold_out,
    load_prompts,
    prompts_hash,
    questions_of,
)

PAGE = (PROMPT_SETS / "README.md").read_text()
FETCH = """
import sys
from pathlib import Path
import fdfo.storage.hub
fdfo.storage.hub.PROMPT_SETS = Path(sys.argv[1])
try:
    fdfo.storage.hub.fetch_prompt_set("hpdv2")
except fdfo.storage.hub.UserError as error:
    sys.exit(str(error))
"""


def rows() -> dict[str, list[str]]:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.splitlines()
        if re.match(r"\| \w+ \| [\d,]+ ", line)
    ]
    return {cells[0]: cells for cells in lines}


def test_the_page_names_every_set_and_tells_the_truth():
    assert set(rows()) == {p.stem for suffix in SUFFIXES for p in PROMPT_SETS.glob(f"*{suffix}")} | {"pickscore_train", "hpdv2"}
    for name in ("showcase", "ocr", "questions", "tiny", "tiny_heldout"):
        content = find_prompts(name).read_bytes()
        _, prompts, _, licence, size, digest = rows()[name]
        assert int(prompts.replace(",", "")) == len(load_prompts(name)) and licence == "Apache-2.0"
        assert (int(size), digest) == (len(content), hashlib.sha256(content).hexdigest())
    assert rows()["pickscore_train"][-1] == PUBLISHED_SHA256["pickscore_train"] and PICKSCORE_COMMAND in PAGE


def test_a_download_that_broke_off_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fdfo.storage.prompts, "PROMPT_SETS", tmp_path)
    (tmp_path / "pickscore_train.txt").write_text("404: Not Found")
    with pytest.raises(UserError, match=r"(?s)is not the published file.*curl"):
        load_prompts("pickscore_train")


def test_the_set_with_questions_is_what_its_script_makes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(PROMPT_SETS)
    import questions

    assert (PROMPT_SETS / "questions.jsonl").read_text().splitlines() == questions.lines()
    prompts = load_prompts("questions")
    assert len(set(prompts)) == 200 and {len(questions_of(prompt)) for prompt in prompts} == {2, 3, 4}
    training, held_out = hold_out(prompts, 20)
    assert all(questions_of(prompt) for prompt in (*training, *held_out))


def test_questions_go_wherever_a_prompt_goes(tmp_path: Path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a\\ncube", "questions": ["Is it  red?"]}\n\n{"prompt": "plain"}\n')
    one, two = load_prompts(str(path))
    assert (
        (one, two) == ("a cube", "plain")
        and questions_of(one) == ("Is it red?",)
        and questions_of(two) == questions_of("text") == ()
    )
    assert questions_of(pickle.loads(pickle.dumps(one))) == questions_of(one) and json.dumps(one) == '"a cube"'
    assert prompts_hash([two]) == prompts_hash(["plain"]) and prompts_hash([one]) != prompts_hash(["a cube"])
    assert prompts_hash([one]) == prompts_hash([Prompt("a cube", ["Is it red?"])]) != prompts_hash([Prompt("a cube", ["Is it?"])])


@pytest.mark.parametrize(
    "line,says",
    [
        ("a red cube", "Line 2 of .* is not"), ('{"prompt": 7}', "Line 2"), ('{"prompt": "a", "question": ["b?"]}', "Extra inputs"),
        ('{"prompt": "a", "questions": [" "]}', "Line 2 of .* has an empty prompt or question"), ('{"prompt": "a", "questions": "b"}', "Line 2"),
    ],
)  # fmt: skip
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str, says: str):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(UserError, match=says):
        load_prompts(str(path))


def fetch(folder: Path, files: dict[str, bytes]) -> tuple[subprocess.CompletedProcess, list[str]]:
    """hpdv2, fetched into a folder from a local hub by a process of its own."""
    folder.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    with HubServer(f"datasets/{HPDV2}", files) as server:
        environment |= {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(folder / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-c", FETCH, str(folder)], env=environment, capture_output=True, text=True, timeout=100
        )
        return done, list(server.served)


def hpdv2(prompts_a_style: int = 800) -> dict[str, bytes]:
    return {
        f"benchmark/{style}.json": json.dumps([f"{style} {i}, é\nsecond line" for i in range(prompts_a_style)]).encode()
        for style in HPDV2_STYLES
    }


def test_hpdv2_is_fetched_on_first_use_alone(tmp_path: Path):
    done, served = fetch(tmp_path, hpdv2() | {"benchmark/other.json": b"[]"})
    assert done.returncode == 0, done.stderr
    assert set(served) == {f"benchmark/{style}.json" for style in HPDV2_STYLES}
    prompts = load_prompts(str(tmp_path / "hpdv2.txt"))
    assert len(prompts) == 3200 and prompts[0] == "anime 0, é second line" and prompts[-1] == "photo 799, é second line"
    done, served = fetch(tmp_path, {})
    assert done.returncode == 0 and not served


@pytest.mark.parametrize(
    "files,says",
    [
        (hpdv2(799), "3196 prompts, 3200 were published"),
        (hpdv2() | {"benchmark/photo.json": b'{"not": "a list"}'}, "not a list of prompts"),
        ({name: content for name, content in hpdv2().items() if "photo" not in name}, "cannot be loaded"),
        (hpdv2() | {"benchmark/photo.json": b'["half'}, "cannot be loaded"),
    ],
    ids=["too few", "another shape", "missing file", "torn"],
)
def test_hpdv2_comes_whole_or_not_at_all(tmp_path: Path, files: dict[str, bytes], says: str):
    done, _ = fetch(tmp_path, files)
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("hpdv2*"))
