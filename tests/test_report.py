"""report.html: what it holds, what it refuses, and, where there is a Chromium, that it works without a network."""

import base64
import dataclasses
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import CHROMIUM, Browser
from conftest import TINY_RUN
from PIL import Image

from fdfo import report
from fdfo.config import PRESETS, UserError
from fdfo.config_file import config_to_json
from fdfo.report import sheets, spread, write_comparison, write_report

HOSTILE = "</script><img src=http://canary.invalid/a.png onerror=alert(1)> & \u2028 {{data.json}}"


def eval_line(epoch: int, rng: random.Random, best: int) -> dict:
    names = {"reward": 2 + epoch / 50, "pickscore": 22 + epoch / 40, "hpsv2": 28.0}
    scores = {name: [mean + rng.gauss(0, 1) for _ in range(16)] for name, mean in names.items()}
    scores["hpsv2"][3] = None
    means = {name: sum(value or 0 for value in values) / 16 for name, values in scores.items()}
    line = {"kind": "eval", "epoch": epoch, "repeats": 2, "prompts": 16, "scores": scores, "means": means}
    line |= {"standard_errors": {name: rng.random() / 4 for name in names}, "held_out": ["hpsv2"], "best": best}
    return line | {"warnings": [f"hpsv2 fell {HOSTILE}"] if epoch == 8 else [], "seconds": 21.5}


def epoch_line(epoch: int, rng: random.Random) -> dict:
    stages = {"checkpoint": 0.4, "encode": 0.8, "sample": 28.9, "decode": 0.9, "reward": 6.1, "update": 58.3}
    return {
        "kind": "epoch", "epoch": epoch, "reward_mean": 2 + 0.7 * (1 - math.exp(-epoch / 40)) + rng.gauss(0, 0.02), "reward_std": 0.8,
        "scores": {"pickscore": 21 + epoch / 50, "vlm_alignment_train": 60 + rng.gauss(0, 1)}, "dropped_pairs": epoch % 2,
        "clipfrac": rng.random() / 4, "grad_norm": math.exp(rng.gauss(0, 1.5)), "loss": None, "differing_pairs": 1.0, "warnings": [],
        "seconds": {name: second * (1 + rng.random() / 9) for name, second in stages.items()},
    }  # fmt: skip


def log_lines(epochs: int, every: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    facts = {"versions": {"torch": "2.9.1"}, "scorers": {"pickscore": HOSTILE}, "processes": 8, "device": "cuda:0"}
    lines = [{"kind": "start", "epoch": 0, "command": ["train.py", "--run-name", "a b"]} | facts, eval_line(0, rng, 0)]
    for epoch in range(1, epochs + 1):
        steps = [{"clipfrac": rng.random() / 4, "grad_norm": math.exp(rng.gauss(0, 1))} for _ in range(4)]
        lines += [{"kind": "step", "epoch": epoch, "step": i} | step for i, step in enumerate(steps, start=1)]
        lines.append(epoch_line(epoch, rng))
        lines += [eval_line(epoch, rng, epoch - epoch % (2 * every))] if epoch % every == 0 else []
    return lines


def make_run(folder: Path, epochs: int = 12, every: int = 4, seed: int = 0) -> Path:
    """A run folder as train.py leaves it, with made-up numbers."""
    (folder / "samples").mkdir(parents=True)
    config = dataclasses.replace(PRESETS["tiny"], seed=seed, num_epochs=max(1, epochs), total_pairs_per_epoch=48)
    (folder / "config.json").write_text(config_to_json(config))
    (folder / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log_lines(epochs, every, seed)))
    for epoch in range(0, epochs + 1, every):
        for name in ("epoch", "pairs") if epoch else ("epoch",):
            Image.new("RGB", (640, 480), (20 * epoch % 256, 80, 120)).save(folder / "samples" / f"{name}-{epoch:07d}.jpg")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "00000-combined-cfg_1p0")


def data_in(page: Path) -> dict:
    """The JSON inside a page."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]


def test_every_line_of_the_log_is_in_the_page(run: Path):
    page = write_report(run)
    assert page == run / "report.html"
    shown = data_in(page)["runs"][0]["lines"]
    for line, there in zip(log_of(run), shown, strict=True):
        scores = line.pop("scores") if line["kind"] == "eval" else None  # of every prompt: the page has their paired change
        if line["kind"] == "start":
            assert there["command"] == "train.py --run-name 'a b'"
            line["command"] = there["command"]
        assert {name: there[name] for name in line} == line
        assert scores is None or there["changes"].keys() == scores.keys()


def test_a_real_run(run_cli, tmp_path: Path):
    code, out, _ = run_cli("train", *TINY_RUN, "--num-epochs", 2, "--runs-dir", tmp_path)
    assert code == 0
    run = tmp_path / "00000-scene-cfg_1p0"
    shown = data_in(write_report(run))["runs"][0]
    kinds = [line["kind"] for line in shown["lines"]]
    assert kinds.count("start") == 1 and kinds.count("epoch") == 2 and kinds.count("step") == 8 and shown["notes"] == []
    assert {"name": "total_pairs_per_epoch", "value": "10", "preset": "128"} in shown["settings"]


def test_changes_are_paired_by_prompt(run: Path):
    first, *_, last = [line for line in log_of(run) if line["kind"] == "eval"]
    there = data_in(write_report(run))["runs"][0]["lines"][-1]
    differences = [b - a for a, b in zip(first["scores"]["reward"], last["scores"]["reward"], strict=True)]
    mean = sum(differences) / 16
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 15 / 16)
    assert there["since"] == 0 and there["changes"]["hpsv2"]["prompts"] == 15
    assert there["changes"]["reward"] == pytest.approx({"mean": mean, "standard_error": error, "prompts": 16})


def test_text_of_the_run_is_no_markup(run: Path, tmp_path: Path):
    odd = run.rename(tmp_path / "<b>bold<")
    config = json.loads((odd / "config.json").read_text()) | {"prompt_set": HOSTILE}
    (odd / "config.json").write_text(json.dumps(config))
    page = write_report(odd)
    text = page.read_text()
    assert text.count("</script>") == text.count("<script") == 6 and "<img" not in text and "<b>" not in text
    assert data_in(page)["runs"][0]["name"] == "<b>bold<"
    assert {"name": "prompt_set", "value": HOSTILE, "preset": "tiny"} in data_in(page)["runs"][0]["settings"]


def test_the_page_names_nothing_outside_it(run: Path):
    text = re.sub(r'<script type="application/json".*?</script>', "", write_report(run).read_text(), flags=re.DOTALL)
    assert "default-src 'none'" in text and not re.search(r"\b(src|href)=[\"']?[^\"'#>]", text) and "@import" not in text
    assert set(re.findall(r"https?://[^\s\"'`]+", text)) == {"http://www.w3.org/2000/svg"}  # the name of SVG's elements


def test_sheets_are_in_the_page_as_they_are(run: Path):
    found = data_in(write_report(run))["sheets"]
    assert [sheet["epoch"] for sheet in found["epoch"]["shown"]] == [0, 4, 8, 12] and found["pairs"]["left_out"] == []
    assert base64.b64decode(found["pairs"]["shown"][0]["jpeg"]) == (run / "samples" / "pairs-0000004.jpg").read_bytes()


def test_sheets_above_the_limit_are_left_out_evenly_and_named(run: Path, monkeypatch: pytest.MonkeyPatch):
    size = (run / "samples" / "epoch-0000000.jpg").stat().st_size
    kept = sheets(run, "epoch", 3 * size + size // 2)
    assert [sheet["epoch"] for sheet in kept["shown"]] == [0, 8, 12] and kept["left_out"] == [4]
    assert spread([5] * 100, 50) == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99] and spread([9, 9, 4], 8) == [2]
    assert spread([9, 9, 9], 8) == spread([], 8) == []
    monkeypatch.setattr(report, "SHEET_BYTES", {"epoch": size, "pairs": 0})
    assert write_report(run).stat().st_size < 2 * size + len(json.dumps(log_of(run))) + 60_000


def test_a_young_run_and_a_log_that_is_cut_off(run: Path):
    log = run / "training_log.jsonl"
    whole = log.read_text()
    log.write_text(whole[:-9])
    shown = data_in(write_report(run))["runs"][0]
    count = len(whole.splitlines())
    assert len(shown["lines"]) == count - 1 and shown["notes"] == [f"Left out of the log, since unreadable: line {count}."]
    log.unlink()
    for sheet in (run / "samples").iterdir():
        sheet.unlink()
    assert data_in(write_report(run))["runs"][0]["lines"] == []


def test_what_another_version_left_is_shown_as_far_as_it_can_be_read(run: Path):
    odd = [
        "[1]",
        "7",
        '{"kind": "epoch"}',
        '{"kind": "eval", "epoch": 99, "scores": [1], "means": 3, "held_out": 4, "warnings": 5}',
    ]
    odd += ['{"kind": "eval", "epoch": 100, "scores": {"reward": "x", "pickscore": [NaN, true]}}', "[" * 100_000]
    odd += ['{"kind": "epoch", "epoch": 99, "reward_mean": 1e999, "seconds": 2, "scores": null}', '{"kind": "new", "epoch": 1}']
    with (run / "training_log.jsonl").open("a") as log:
        log.write("\n".join(odd))
    (run / "config.json").write_text("{")
    shown = data_in(write_report(run))["runs"][0]
    assert len(shown["lines"]) == len(log_lines(12, 4, 0)) + 4 and len(shown["notes"]) == 2 and shown["settings"] == []


def test_an_epoch_done_again_counts_once(run: Path):
    again = {"kind": "epoch", "epoch": 12, "reward_mean": 5.0}
    with (run / "training_log.jsonl").open("a") as log:
        log.write(json.dumps(again) + "\n")
    found = [line for line in data_in(write_report(run))["runs"][0]["lines"] if line["kind"] == "epoch"]
    assert len(found) == 12 and found[-1] == again


def test_wrong_input_is_one_sentence(run: Path, run_cli, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for arguments, says in {
        ("nowhere",): "nowhere is no run folder",
        (tmp_path / "empty",): "is no run folder",
        (run, run): "named twice",
        (run, "--out", "report.txt"): "end it with .html",
        (run, "--out", tmp_path / "nowhere" / "x.html"): "cannot be written",
        (): "No run is named",
    }.items():
        code, _, err = run_cli("fdfo.report", *arguments)
        assert code == 2 and says in err and err.count("\n") == 1
    assert not (run / "report.html").exists()


def test_command_line_writes_one_run_and_compares_several(run: Path, run_cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert run_cli("fdfo.report", run)[0] == 0 and (run / "report.html").exists()
    other = make_run(tmp_path / "other" / run.name, seed=1)
    code, out, _ = run_cli("fdfo.report", run, other)
    assert code == 0 and out == "report: report.html\n"
    assert [one["name"] for one in data_in(tmp_path / "report.html")["runs"]] == [str(run), str(other)]


def test_a_failed_write_leaves_the_page_before(run: Path, monkeypatch: pytest.MonkeyPatch):
    before = write_report(run).read_bytes()
    monkeypatch.setattr("fdfo.manifest.sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    with Browser(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture
def tab(browser: Browser) -> Browser:
    browser.console, browser.requests = [], []
    return browser


def test_the_browser_would_tell_errors_and_requests(tab: Browser, tmp_path: Path):
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://canary.invalid/a.png'><script>console.log('hello'); missing()</script>")
    tab.open(page)
    assert tab.requests == [page.as_uri(), "http://canary.invalid/a.png"]
    assert any("hello" in line for line in tab.console) and any("missing is not defined" in line for line in tab.console)


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_opens_without_error_request_or_sideways_scroll(tab: Browser, run: Path, tmp_path: Path, width: int, dark: bool):
    pages = [write_report(run), write_comparison((run, make_run(tmp_path / "b", 9)), tmp_path / "both.html")]
    pages.append(write_report(make_run(tmp_path / ("long_name" * 15), 0)))
    for page in pages:
        tab.requests = []
        tab.open(page, width, dark=dark)
        tab.run("document.querySelectorAll('details').forEach((one) => (one.open = true))")
        tab.settle()
        assert tab.requests == [page.as_uri()] and tab.console == []
        assert tab.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert tab.run("document.querySelectorAll('figure').length === document.querySelectorAll('.plot > svg').length")
        background = tab.run("getComputedStyle(document.body).backgroundColor")
        assert (int(re.search(r"\d+", background)[0]) < 100) == dark


def test_what_a_reader_sees(tab: Browser, run: Path, tmp_path: Path):
    tab.open(write_report(run))
    text = tab.run("document.body.innerText")
    for part in ("1 warning", f"epoch 8\thpsv2 fell {HOSTILE}", "hpsv2 (not trained on)", "change since epoch 0", "best, epoch 8",
                 "train.py --run-name 'a b'", "2.9.1", "total_pairs_per_epoch\t48\t128", "Log scale."):  # fmt: skip
        assert " ".join(part.split()) in " ".join(text.split()), part
    assert tab.run("document.querySelectorAll('.best').length") == 3  # reward, pickscore, hpsv2
    tab.open(write_comparison((run, make_run(tmp_path / "another", 9)), tmp_path / "both.html"))
    names = "[...document.querySelector('figure').querySelectorAll('.name')].map((one) => one.textContent)"
    assert tab.run(names) == [run.name, "another"] and tab.run("document.querySelector('.at').textContent") == "newest"


def test_odd_logs_open_without_error(tab: Browser, run: Path):
    test_what_another_version_left_is_shown_as_far_as_it_can_be_read(run)
    tab.open(run / "report.html")
    assert tab.console == [] and tab.run("document.querySelectorAll('figure').length") > 5


def test_charts_by_keyboard(tab: Browser, run: Path):
    tab.open(write_report(run))
    shown = "document.activeElement.getAttribute('aria-valuetext')"
    for _ in range(40):
        tab.press("Tab")
        if str(tab.run("document.activeElement.getAttribute('aria-label')")).startswith("Held-out reward"):
            break
    assert tab.run(shown).startswith("epoch 12: ")
    tab.press("ArrowLeft")
    means = {line["epoch"]: line["means"]["reward"] for line in log_of(run) if line["kind"] == "eval"}
    assert tab.run(shown).startswith(f"epoch 8: Held-out reward {means[8]:.3f} \u00b1 ")
    assert tab.run("document.querySelector('.at').textContent") == "epoch 8"  # the training reward's chart follows
    tab.press("Home", "ArrowLeft")
    assert tab.run(shown).startswith("epoch 0: ")
    tab.press("End", "Tab", "Enter")
    tab.settle()
    assert tab.run("document.activeElement.parentElement.querySelectorAll('tbody tr').length") == 4


def test_sheets_by_keyboard(tab: Browser, run: Path):
    tab.open(write_report(run))
    tab.run("document.getElementById('slider-epoch').focus()")
    tab.press("ArrowLeft")
    assert tab.run("document.activeElement.getAttribute('aria-valuetext')") == "epoch 8"
    jpeg = (run / "samples" / "epoch-0000008.jpg").read_bytes()
    assert tab.run("document.querySelector('.sheet img').src") == f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    assert tab.run("document.querySelector('.sheet img').decode().then(() => 'drawn')") == "drawn"
