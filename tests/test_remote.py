"""Scorers that ask a server: rewards/serve.py, servers that misbehave, are killed or speak the chat protocol, and what stays secret."""

import base64
import dataclasses
import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from score_server import AppServer, ScoreServer, chat_reply
from test_training import log_of, small

from fdfo.config.errors import UserError
from fdfo.config.train_options import SampleConfig
from fdfo.distributed.job import Job
from fdfo.method.trainer import train
from rewards.registry import build_scorers, reward_weights
from rewards.remote.address import Address, parse_address
from rewards.remote.chat import QUESTION, ChatScorer
from rewards.remote.http import MAX_BATCH, HttpScorer
from rewards.remote.server import Limits
from rewards.serve import build_app

IMAGES = torch.rand(2 * MAX_BATCH + 3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
CAPTION = "a red ring on a blue background"
HASTY = Limits(seconds=0.3, patience=0.6, patience_500=0.6)
TWO_STEPS = SampleConfig(num_solver_steps=2, resolution=64)
KEY = "sk-not-to-be-seen-1234"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.remote.server.FIRST_WAIT", 0.05)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_a_served_scorer_gives_its_own_scores_in_order(job: Job):
    scene, prompts = build_scorers(["scene"], job)["scene"], [CAPTION, "a green cross on a white background"] * 9 + [CAPTION]
    quantised = (255 * IMAGES).round().to(torch.uint8)
    with AppServer(build_app("scene", scene)) as url:
        served = build_scorers([url], job)[url]
        assert torch.equal(served.score(prompts, IMAGES), scene.score(prompts, quantised))
        assert torch.equal(served.score(prompts, quantised), scene.score(prompts, quantised)) and url in served.description
        with pytest.raises(UserError, match="refused the request .status 422: The scene scorer needs images of 64 x 64"):
            served.score(prompts[:1], torch.rand(1, 3, 8, 8))
        with pytest.raises(UserError, match="status 400: The question is malformed"):
            served.score([7], IMAGES[:1])


class Fails:
    def score(self, prompts: list[str], images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([math.nan, math.inf, 1.0]) if prompts[0] == "odd" else 1 / 0


def test_a_served_scorer_that_fails_says_so(job: Job, capsys):
    with AppServer(build_app("mine", Fails())) as url:
        assert str(HttpScorer(url).score(["odd"] * 3, IMAGES[:3]).tolist()) == "[nan, nan, 1.0]"
        with pytest.raises(UserError, match="has failed .status 500: The scorer mine failed twice in a row .ZeroDivisionError"):
            HttpScorer(url, HASTY).score(["a"], IMAGES[:1])
    assert "it is asked again for up to 0.6 seconds" in capsys.readouterr().err


def scores(*values: object) -> bytes:
    return json.dumps({"scores": list(values)}).encode()


@pytest.mark.parametrize(
    "status,body,says",
    [
        (200, scores(1.0, 2.0), "returned 2 numbers for 3 images"),
        (200, b"<html>", "answered what is no JSON .status 200: <html>"),
        (200, b"[" * 2**17, "no JSON"),
        (200, b"[1, 2, 3]", "it must answer"),
        (200, scores(1.0, True, "2"), "it must answer"),
        (200, b"7" * (2**20 + 1), "sent more than 1,048,576 bytes"),
        (404, b"no such path", "refused the request .status 404: no such path"),
        (401, b"", "refuses the key, or wants one"),
        (307, b"", "refused the request .status 307"),
        (500, b"out of memory", "has failed .status 500: out of memory., for 0 seconds: look at its log"),
        (503, b"", "is busy .status 503., for 0 seconds"),
    ],
)
def test_each_wrong_answer_has_its_sentence(status: int, body: bytes, says: str):
    with ScoreServer(lambda *question: (status, body)) as server, pytest.raises(UserError, match=says) as error:
        HttpScorer(f"{server.address}/score", HASTY).score(["a"] * 3, IMAGES[:3])
    assert len(server.paths) == 1 if status < 500 else len(server.paths) > 2
    assert len(str(error.value)) < 400


def test_slow_and_absent_servers_have_their_sentences():
    def slow(*question: object) -> tuple[int, bytes]:
        time.sleep(0.5)
        return 200, scores(1.0)

    with ScoreServer(slow) as server, pytest.raises(UserError, match="did not answer within 0.3 seconds, for"):
        HttpScorer(server.address, HASTY).score(["a"], IMAGES[:1])
    with pytest.raises(UserError, match="Nothing answers at .* start the server first"):
        HttpScorer(server.address)


def test_what_may_pass_passes_and_numbers_that_are_none_stay_in_their_place():
    def reply(question: dict, number: int, headers: dict) -> tuple[int, bytes]:
        if number < 4:
            return (500, 503, 429)[number - 1], b""
        values = [image_mean(image) for image in question["images"]]
        return 200, json.dumps({"scores": [None, math.nan, math.inf, 10**400, *values[4:]]}).encode()

    with ScoreServer(reply) as server:
        values = HttpScorer(server.address).score(["a"] * MAX_BATCH, IMAGES[:MAX_BATCH])
    assert str(values[:4].tolist()) == "[nan, nan, inf, inf]" and len(server.paths) == 4
    torch.testing.assert_close(values[4:], 255 * IMAGES[4:MAX_BATCH].mean((1, 2, 3)), rtol=0, atol=0.1)


def image_mean(png: str) -> float:
    """The mean of an image's pixels, decoded without this project."""
    pixels = Image.open(io.BytesIO(base64.b64decode(png))).tobytes()
    return sum(pixels) / len(pixels)


@pytest.fixture(scope="module")
def page_server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server of docs/rewards.md, which kills itself once, inside the second epoch's second question, if ONCE names a new file."""
    (block,) = re.findall(
        r'^```python\n("""python judge_server.py 8000.*?)^```', (ROOT / "docs/rewards.md").read_text(), re.M | re.S
    )
    trap = (
        "    count.append(1)\n    if len(count) == 12 + 9 and not os.path.exists(os.environ['ONCE']):\n"
        "        open(os.environ['ONCE'], 'w').close()\n        os.kill(os.getpid(), 9)\n    return float("
    )
    assert len(block.splitlines()) <= 36
    path = tmp_path_factory.mktemp("server") / "judge_server.py"
    path.write_text("import os\ncount = []\n" + block.replace("    return float(", trap))
    return path


def test_another_package_is_served_as_the_page_says(page_server: Path, tmp_path: Path):
    """With a stand-in for ImageReward that has its two functions, and needs nothing of this project."""
    page = (ROOT / "docs" / "rewards.md").read_text()
    block = textwrap.dedent(page[page.index("    import ImageReward") : page.index("This was tried with a stand-in")])
    (tmp_path / "ImageReward.py").write_text(
        "class Model:\n    def score(self, prompt, image):\n        return len(prompt) + image.getpixel((0, 0))[0]\n\n\n"
        "def load(name):\n    assert name == 'ImageReward-v1.0'\n    return Model()\n"
    )
    server = page_server.read_text()
    start, end = server.index("def judge("), server.index("class Handler")
    (tmp_path / "judge_server.py").write_text(server[:start] + block + server[end:])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = serve(tmp_path / "judge_server.py", port, tmp_path / "once")
    values = HttpScorer(f"http://127.0.0.1:{port}").score(["a", "bcd"], (255 * IMAGES[:2]).round().to(torch.uint8))
    process.kill()
    assert values.tolist() == ((255 * IMAGES[:2, 0, 0, 0]).round() + torch.tensor([1, 3])).tolist()


def serve(script: Path, port: int, once: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, script, str(port)], env=os.environ | {"ONCE": str(once)}, stderr=subprocess.DEVNULL
    )
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return process
        except OSError:
            time.sleep(0.02)


def test_a_server_killed_and_started_again_changes_nothing(page_server: Path, job: Job, tmp_path: Path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    once, servers = tmp_path / "once", []
    config = small(tmp_path / "killed", reward_specs=(f"http://127.0.0.1:{port}/score=1.0",), num_epochs=2, sample=TWO_STEPS)
    servers.append(serve(page_server, port, once))

    def start_again() -> None:
        assert servers[0].wait() == -9
        servers.append(serve(page_server, port, once))

    watch = threading.Thread(target=start_again)
    watch.start()
    killed = train(job, config)
    watch.join()
    assert once.exists() and len(servers) == 2
    assert "cannot be reached, or hung up; it is asked again for up to 600 seconds" in capsys.readouterr().err
    straight = train(job, dataclasses.replace(config, runs_dir=tmp_path / "straight"))
    servers[1].kill()
    one, two = (load_file(run.folder / "checkpoints/epoch-0000002/adapter_model.safetensors") for run in (killed, straight))
    assert all(torch.equal(one[name], two[name]) for name in one) and log_of(straight.folder, "epoch")[1]["differing_pairs"] > 0.5


def test_addresses():
    assert parse_address("http://[::1]:80/a/b") == Address("http://[::1]:80/a/b", None)
    assert parse_address("openai+https://host/v1/#org/model=x") == Address("https://host/v1", "org/model=x")
    assert reward_weights("scene", ("http://h:1/score=0.5", "openai+http://h/v1#m=2")) == {
        "http://h:1/score": 0.5, "openai+http://h/v1#m": 2.0,
    }  # fmt: skip
    for name in (
        "ftp://h/x",
        "http://",
        "http://h:x/",
        "http://h:99999/",
        "http://h/x#m",
        "openai+http://h/v1",
        "openai+http://h/v1#",
    ):
        with pytest.raises(UserError, match="names no server: write http://HOST"):
            parse_address(name)
    for name in ("http://me:secret@h/x", "http://h/x?key=secret", "openai+http://secret@h/v1#m"):
        with pytest.raises(UserError, match="leave out whatever is secret") as error:
            parse_address(name)
        assert "secret@" not in str(error.value) and "key=secret" not in str(error.value)


def answer_by_brightness(question: dict, number: int, headers: dict) -> tuple[int, bytes]:
    """A judge that likes bright images, behind a key."""
    if headers.get("Authorization") != f"Bearer {KEY}":
        return 401, f"Incorrect API key provided: {headers.get('Authorization')}".encode()
    picture, text = question["messages"][1]["content"]
    assert (
        question["model"] == "org/judge"
        and question["max_tokens"] == 1
        and question["logprobs"]
        and question["top_logprobs"] == 20
    )
    assert text == {"type": "text", "text": QUESTION.replace("{prompt}", CAPTION)}
    p = image_mean(picture["image_url"]["url"].removeprefix("data:image/png;base64,")) / 255
    return 200, chat_reply({"Yes": math.log(0.5 * p), " yes": math.log(0.2 * p), "No": math.log(0.7 * (1 - p)), "Maybe": -9.0})


def test_a_chat_endpoint_judges_by_its_first_token(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ScoreServer(answer_by_brightness) as server:
        values = ChatScorer(f"{server.address}/v1", "org/judge").score([CAPTION] * 19, IMAGES)
    assert set(server.paths) == {"/v1/chat/completions"} and len(server.paths) == 19
    torch.testing.assert_close(values, 100 * IMAGES.mean((1, 2, 3)), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "body,says",
    [(chat_reply({"The": -0.1}), None), (b'{"choices": [{"message": {"content": "Yes"}, "logprobs": null}]}', "top_logprobs")],
)
def test_a_chat_endpoint_without_an_answer(body: bytes, says: str | None):
    with ScoreServer(lambda *question: (200, body)) as server:
        judge = ChatScorer(server.address, "m")
        if says is None:
            assert judge.score([CAPTION], IMAGES[:1]).isnan().all()
        else:
            with pytest.raises(UserError, match=says):
                judge.score([CAPTION], IMAGES[:1])


def judge_of(server: ScoreServer) -> torch.Tensor:
    return ChatScorer(f"{server.address}/v1", "org/judge").score([CAPTION], IMAGES[:1])


def test_a_key_is_in_no_log_config_or_error(run_cli, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run with a chat endpoint as its reward, a resume that must name it, a wrong key, a server that repeats it, a key of two lines."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "prompts.txt").write_text(CAPTION + "\n")
    quick = ("--preset", "tiny", "--total-pairs-per-epoch", 2, "--sample.num-solver-steps", 2, "--num-epochs", 1, "--runs-dir", tmp_path,
             "--prompt-set", tmp_path / "prompts.txt", "--eval-prompts", 0)  # fmt: skip
    with ScoreServer(answer_by_brightness) as server:
        spec = f"openai+{server.address}/v1#org/judge=0.5"
        code, out, err = run_cli("train", *quick, "--reward-specs", spec)
        assert code == 0, err
        shown = [out, err]
        code, out, err = run_cli("train", "--resume-from", tmp_path / "00000-custom-cfg_1p0", "--num-epochs", 2)
        assert code == 2 and f"uses a server: say so again with --reward-specs {spec}" in err
        (log,) = log_of(tmp_path / "00000-custom-cfg_1p0", "epoch")
        assert log["scores"].keys() == {spec.removesuffix("=0.5")}
        monkeypatch.setenv("OPENAI_API_KEY", KEY + "x")
        with pytest.raises(UserError, match="refuses the key, or wants one .status 401.: a chat") as wrong:
            judge_of(server)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ScoreServer(lambda question, number, headers: (400, headers["Authorization"].encode())) as server:
        with pytest.raises(UserError, match=r"status 400: Bearer \*\*\*") as repeated:
            judge_of(server)
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX: y")
        with pytest.raises(UserError, match="OPENAI_API_KEY has characters that no key has") as torn:
            judge_of(server)
    shown += [err, *(str(error.value) for error in (wrong, repeated, torn))]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in "".join(shown) and KEY.encode() not in written and b"org/judge" in written
