"""Prompt sets: what their page says of them, the fetching of hpdv2, and a pickscore_train that is not the published file."""

import hashlib
import json
import os
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
from fdfo.storage.prompts import PICKSCORE_COMMAND, PROMPT_SETS, PUBLISHED_SHA256, load_prompts

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
    assert set(rows()) == {p.stem for p in PROMPT_SETS.glob("*.txt")} | {"pickscore_train", "hpdv2"}
    for name in ("showcase", "ocr", "tiny", "tiny_heldout"):
        content = (PROMPT_SETS / f"{name}.txt").read_bytes()
        _, prompts, _, licence, size, digest = rows()[name]
        assert int(prompts.replace(",", "")) == len(load_prompts(name)) and licence == "Apache-2.0"
        assert (int(size), digest) == (len(content), hashlib.sha256(content).hexdigest())
    assert rows()["pickscore_train"][-1] == PUBLISHED_SHA256["pickscore_train"] and PICKSCORE_COMMAND in PAGE


def test_a_download_that_broke_off_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fdfo.storage.prompts, "PROMPT_SETS", tmp_path)
    (tmp_path / "pickscore_train.txt").write_text("404: Not Found")
    with pytest.raises(UserError, match=r"(?s)is not the published file.*curl"):
        load_prompts("pickscore_train")


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
