"""The report: what the page holds, what it refuses, and, where there is a Chromium, that it works without a network."""

import base64
import dataclasses
import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from fdfo.config.errors import UserError
from fdfo.config.options import to_json
from fdfo.config.presets import PRESETS
from fdfo.report.charts import with_error
from fdfo.report.html import write_comparison, write_report
from fdfo.report.run_data import newest_of, read_sheets
from fdfo.run_folder.log import read_log

CHROMIUM = shutil.which("chromium")
HOSTILE = "</script><img src=http://canary.invalid/a.png onerror=alert(1)> & \u2028 {{ title }} \"'"


def eval_line(epoch: int, rng: random.Random, best: int) -> dict:
    names = {"reward": 2 + epoch / 50, "pickscore": 22 + epoch / 40, "hpsv2": 28.0}
    scores = {name: [mean + rng.gauss(0, 1) for _ in range(16)] for name, mean in names.items()}
    scores["hpsv2"][3] = None
    means = {name: sum(value or 0 for value in values) / 16 for name, values in scores.items()}
    line = {"kind": "eval", "epoch": epoch, "repeats": 2, "prompts": 16, "scores": scores, "means": means}
    line |= {"standard_errors": {name: rng.random() / 4 for name in names}, "held_out": ["hpsv2"], "best": best, "since": 0}
    changes = {
        name: {"before": 1, "after": 2, "difference": epoch / 8, "error": 0.25, "count": 16} for name in ("reward", "hpsv2")
    }
    line["changes"] = changes
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
    config = dataclasses.replace(PRESETS["tiny-published"], seed=seed, num_epochs=max(1, epochs), total_pairs_per_epoch=48)
    (folder / "config.json").write_text(to_json(config))
    (folder / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log_lines(epochs, every, seed)))
    for epoch in range(0, epochs + 1, every):
        for name in ("epoch", "pairs") if epoch else ("epoch",):
            Image.new("RGB", (640, 480), (20 * epoch % 256, 80, 120)).save(folder / "samples" / f"{name}-{epoch:07d}.jpg")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "00000-combined-cfg_1p0")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, int]]:
    """Pages of a run, of several and of one that has just begun, with the number of their figures."""
    folder = tmp_path_factory.mktemp("runs")
    runs = make_run(folder / "00000-combined-cfg_1p0"), make_run(folder / ("long_name" * 15), 9)
    young = make_run(folder / ("another" * 20), 0)
    return [(write_report(runs[0]), 12), (write_comparison(runs, folder / "both.html"), 12), (write_report(young), 3)]


class Text(HTMLParser):
    """The tags of a page, and its text outside of scripts and styles, with one space for every gap."""

    def __init__(self, page: Path):
        super().__init__()
        self.tags, self.parts = [], []
        self.feed(page.read_text())
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.parts.append(data)

    def images(self) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def spaced(text: str) -> str:
    return " ".join(text.split())


def curves_in(page: Path) -> dict[str, dict]:
    """The data of the figures that bokeh draws, by id of their element."""
    (found,) = re.findall(r'<script type="application/json" id="curves">(.*?)</script>', page.read_text(), re.DOTALL)
    data = json.loads(found)
    figures = {root["id"]: root for root in data["documents"]["report"]["roots"]}
    return {place: figures[one] for item in data["items"] for one, place in item["roots"].items()}


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]


def test_the_page_shows_every_epoch_evaluation_and_start(pages: list):
    page, run = pages[0][0], pages[0][0].parent
    assert page.name == "report.html"
    text, curves = Text(page).text, json.dumps(curves_in(page))
    for line in log_of(run):
        if line["kind"] == "epoch":
            error = line["reward_std"] / math.sqrt(48 - line["dropped_pairs"])
            assert f"{line['epoch']} {with_error(line['reward_mean'], error)}" in text and str(line["reward_mean"]) in curves
            assert f"{line['epoch']} {with_error(line['scores']['pickscore'])}" in text
            assert f"{line['epoch']} {with_error(line['clipfrac'])} (" in text
        if line["kind"] == "eval":
            for name, mean in line["means"].items():
                assert f"{line['epoch']} {with_error(mean, line['standard_errors'][name])}" in text and str(mean) in curves
    for part in ("train.py --run-name 'a b'", "torch 2.9.1", "total_pairs_per_epoch 48 128", "Epochs done 12 of 12",
                 "not trained on", "held-out prompts", "training prompts", "Dashed line: the best epoch, 8."):  # fmt: skip
        assert part in text, part
    assert len(curves_in(page)) == text.count(" Values epoch ") == 12


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The tiny model trains ten times as fast on one thread where other processes use the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_real_run(run_cli: Callable, tmp_path: Path, one_thread: None):
    code, out, _ = run_cli("train", *TINY_RUN, "--num-epochs", 1, "--runs-dir", tmp_path)
    assert code == 0
    text = Text(write_report(tmp_path / "00000-scene-cfg_1p0")).text
    assert "Epochs done 1 of 1" in text and "total_pairs_per_epoch 10 128" in text and "unreadable" not in text


def test_changes_are_those_of_the_log(run: Path):
    last, text = log_of(run)[-1], Text(write_report(run)).text
    row = "hpsv2 (not trained on) " + " ".join(held_out_cells(run, "hpsv2"))
    assert "change since epoch 0 best, epoch 8 reward " in text and row in text and "+1.50 ± 0.25" in row
    line = {name: value for name, value in last.items() if name not in ("since", "changes")}  # as earlier versions wrote it
    with (run / "training_log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    row = row.replace("+1.50 ± 0.25", "–")
    assert row in Text(write_report(run)).text


def held_out_cells(run: Path, name: str) -> list[str]:
    """The cells of a score: at the first and at the newest evaluation, the change, at the best evaluation."""
    lines = {line["epoch"]: line for line in log_of(run) if line["kind"] == "eval"}
    first, newest, best = (with_error(lines[i]["means"][name], lines[i]["standard_errors"][name]) for i in (0, 12, 8))
    change = lines[12]["changes"][name]
    return [first, newest, "+" + with_error(change["difference"], change["error"]), best]


def test_warnings_come_newest_first_and_older_ones_behind_a_click(run: Path):
    lines = log_of(run)
    for line in lines:
        if line["kind"] == "epoch":
            line["warnings"] = [f"odd{line['epoch']}"]
    (run / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Text(write_report(run)).text
    places = [text.index(f"odd{epoch} ") for epoch in range(12, 0, -1)]
    assert "13 warnings epoch 12 odd12 epoch 11 odd11" in text and places == sorted(places)
    assert "epoch 8 odd8 8 earlier epoch 8 hpsv2 fell" in text


def test_text_of_the_run_is_no_markup(run: Path, tmp_path: Path):
    odd = run.rename(tmp_path / "<b>bold<")
    config = json.loads((odd / "config.json").read_text()) | {"prompt_set": HOSTILE}
    (odd / "config.json").write_text(json.dumps(config))
    line = {
        "kind": "epoch",
        "epoch": 13,
        HOSTILE: 2,
        "seconds": {HOSTILE: 3},
        "scores": {HOSTILE: 4},
        "warnings": ["half \ud800"],
    }
    with (odd / "training_log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    pages = [write_report(odd), write_comparison((odd, make_run(tmp_path / HOSTILE.replace("/", "_"))), tmp_path / "both.html")]
    for page in pages:
        found, shown = Text(page), page.read_text()
        assert shown.count("</script") == shown.count("<script") == 3 and "<b>bold" not in shown
        assert spaced(HOSTILE) in found.text and "<b>bold<" in found.text
        assert all(image["src"].startswith("data:image/jpeg;base64,") and "onerror" not in image for image in found.images())
    assert f"prompt_set {spaced(HOSTILE)} tiny" in Text(pages[0]).text and "half ?" in Text(pages[0]).text


def test_the_page_names_nothing_outside_it(pages: list):
    page = pages[0][0]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'nonce-"
    assert policy in page.read_text() and "unsafe-eval" not in page.read_text().partition("<style>")[0]
    for tag, attributes in Text(page).tags:
        assert tag not in ("link", "iframe", "object", "base") and attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
    style = re.search(r"<style>(.*?)</style>", page.read_text(), re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style


def test_sheets_are_in_the_page_as_they_are(pages: list):
    page, run = pages[0][0], pages[0][0].parent
    images = Text(page).images()
    assert [image["alt"] for image in images] == [f"Samples, epoch {i}" for i in (0, 4, 8, 12)] + [
        f"Training pairs, epoch {i}" for i in (4, 8, 12)
    ]
    assert [image["alt"] for image in images if "hidden" not in image] == ["Samples, epoch 12", "Training pairs, epoch 12"]
    assert base64.b64decode(images[4]["src"].partition(",")[2]) == (run / "samples" / "pairs-0000004.jpg").read_bytes()


def test_of_many_sheets_some_are_left_out_evenly(run: Path):
    for epoch in range(1, 100):
        shutil.copy(run / "samples" / "epoch-0000000.jpg", run / "samples" / f"epoch-{epoch:07d}.jpg")
    shown, left_out = read_sheets(run, "epoch")
    epochs = [epoch for epoch, _ in shown]
    assert len(epochs) == 40 and left_out == 60 and epochs[0] == 0 and epochs[-1] == 99
    assert {b - a for a, b in zip(epochs, epochs[1:], strict=False)} == {2, 3}
    assert "60 of 100 sheets are left out here" in Text(write_report(run)).text


def test_a_young_run_and_a_log_that_is_cut_off(run: Path):
    log = run / "training_log.jsonl"
    whole = log.read_text()
    log.write_text(whole[:-9])
    count = len(whole.splitlines())
    lines, unreadable = read_log(log)
    assert len(lines) == count - 1 and unreadable == [count]
    assert f"Left out of the log, since unreadable: line {count}." in Text(write_report(run)).text
    log.unlink()
    for sheet in (run / "samples").iterdir():
        sheet.unlink()
    page = write_report(run)
    assert "No epoch is done yet." in Text(page).text and curves_in(page) == {} and read_log(log) == ([], [])


def add_odd_lines(run: Path) -> None:
    odd = [
        "[1]",
        "7",
        '{"kind": "epoch"}',
        '{"kind": "epoch", "epoch": ' + "9" * 30 + "}",
        '{"kind": "eval", "epoch": 99, "scores": [1], "means": 3, "held_out": 4, "warnings": 5, "changes": 6, "best": "x"}',
        '{"kind": "eval", "epoch": 100, "means": {"reward": "x", "pickscore": [NaN, true]}, "changes": {"reward": [1]}}',
        "[" * 100_000,
        '{"kind": "epoch", "epoch": 99, "reward_mean": 1e999, "seconds": 2, "scores": null, "grad_norm": NaN}',
        '{"kind": "epoch", "epoch": 98, "reward_mean": ' + "9" * 400 + ', "grad_norm": 0, "seconds": {"update": "x"}}',
        '{"kind": "new", "epoch": 1}',
        '{"kind": "start", "epoch": 99, "command": "text", "versions": [1]}',
    ]
    with (run / "training_log.jsonl").open("a") as log:
        log.write("\n".join(odd))
    (run / "config.json").write_text("{")


def test_what_another_version_left_is_shown_as_far_as_it_can_be_read(run: Path):
    count = len(log_of(run))
    add_odd_lines(run)
    lines, unreadable = read_log(run / "training_log.jsonl")
    assert len(lines) == count + 6 and unreadable == [count + i for i in (1, 2, 3, 4, 7)]
    text = Text(write_report(run)).text
    assert "since unreadable: line" in text and "config.json cannot be read" in text and "Epochs done 99 " in text
    assert len(curves_in(run / "report.html")) == 12


def test_an_epoch_done_again_counts_once(run: Path):
    again = {"kind": "epoch", "epoch": 12, "reward_mean": 5.0}
    with (run / "training_log.jsonl").open("a") as log:
        log.write(json.dumps(again) + "\n")
    lines = newest_of(read_log(run / "training_log.jsonl")[0])
    found = [line for line in lines if line["kind"] == "epoch"]
    assert len(found) == 12 and found[-1] == again


def test_wrong_input_is_one_sentence(run: Path, run_cli: Callable, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for arguments, says in {
        ("nowhere",): "nowhere is no run folder",
        (tmp_path / "empty",): "is no run folder",
        (tmp_path / "empty", "--watch"): "is no run folder",
        (run, run): "named twice",
        (run, tmp_path / "empty", "--watch"): "--watch is for one run",
        (run, "--out", "report.txt"): "end it with .html",
        (run, "--out", tmp_path / "nowhere" / "x.html"): "cannot be written",
        (): "No run is named",
    }.items():
        code, _, err = run_cli("fdfo.report.__main__", *arguments)
        assert code == 2 and says in err and err.count("\n") == 1
    assert not list(run.glob("*.html")) and not list(run.glob(".*"))


def test_command_line_writes_one_run_and_compares_several(
    run: Path, run_cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert run_cli("fdfo.report.__main__", run)[0] == 0 and (run / "report.html").exists()
    other = make_run(tmp_path / "other" / run.name, epochs=9, seed=1)
    code, out, _ = run_cli("fdfo.report.__main__", run, other)
    text = Text(tmp_path / "report.html").text
    assert code == 0 and out == "report: report.html\n" and "2 runs" in text and "training run" not in text
    for name, epochs in ((run, 12), (other, 9)):
        assert f"{name} {epochs} " in text
    assert "num_epochs 12 9" in text and "seed 0 1" in text and "total_pairs_per_epoch" not in text


def test_watch_writes_the_page_whenever_the_log_grows(run: Path, run_cli: Callable, monkeypatch: pytest.MonkeyPatch):
    page, seen = run / "watch.html", []

    def sleep(_: float) -> None:
        seen.append((page.stat().st_mtime_ns, "}, 30000);" in page.read_text()))
        if len(seen) == 2:  # nothing happened since the first look
            with (run / "training_log.jsonl").open("a") as log:
                log.write(json.dumps(epoch_line(13, random.Random(0))) + "\n")
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    code, out, _ = run_cli("fdfo.report.__main__", run, "--watch")
    assert code == 0 and "watch.html" in out and out.count("\n") == 1 and not (run / "report.html").exists()
    (first, _), (second, _), (third, _) = seen
    assert first == second < third and "Epochs done 13 of 12" in Text(page).text
    assert all(reloads for _, reloads in seen) and "}, 30000);" not in page.read_text()


def test_a_failed_write_leaves_the_page_before(run: Path, monkeypatch: pytest.MonkeyPatch):
    before = write_report(run).read_bytes()
    monkeypatch.setattr(
        "fdfo.storage.atomic_files.sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(UserError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


class Tab:
    """A page in a browser, with what it said and what it asked for."""

    def __init__(self, browser: Browser, file: Path, width: int = 1280, scheme: str = "light"):
        self.page: Page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.trouble, self.requests = [], []
        self.page.on("console", lambda message: self.trouble.append(message.text) if self.is_trouble(message) else None)
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("request", lambda request: None if request.url.startswith("data:") else self.requests.append(request.url))
        self.page.goto(file.absolute().as_uri())

    @staticmethod
    def is_trouble(message: ConsoleMessage) -> bool:
        """Return whether a page warns. What Chromium says of getImageData is about drawn() below."""
        return message.type in ("error", "warning") and not message.text.startswith("Canvas2D")

    def drawn(self) -> int:
        """The number of figures, once each is drawn at a size of its own."""
        script = """() => [...document.querySelectorAll('.plot')].every((plot) => {
            const canvas = plot.firstElementChild?.shadowRoot?.querySelector('.bk-Canvas')?.shadowRoot.querySelector('canvas');
            return canvas && canvas.clientWidth > 100 && canvas.clientHeight > 100 &&
                canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value > 0);
        })"""
        self.page.wait_for_function(script, timeout=15_000)
        return self.page.locator("figure .plot").count()

    def open_details(self) -> None:
        self.page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")


def test_the_browser_would_tell_errors_and_requests(browser: Browser, tmp_path: Path):
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://canary.invalid/a.png'><script>console.error('hello'); missing()</script>")
    tab = Tab(browser, page)
    assert tab.requests == [page.as_uri(), "http://canary.invalid/a.png"]
    assert any("hello" in line for line in tab.trouble) and any("missing is not defined" in line for line in tab.trouble)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_error_request_or_sideways_scroll(browser: Browser, pages: list, scheme: str):
    for file, figures in pages:
        tab = Tab(browser, file, 360, scheme)
        tab.open_details()
        for width in (360, 1280):
            tab.page.set_viewport_size({"width": width, "height": 900})
            assert tab.drawn() == figures
            assert tab.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
            widths = tab.page.evaluate("[...document.querySelectorAll('.plot')].map((one) => one.firstElementChild.clientWidth)")
            assert all(0.4 * width < one < width for one in widths)
        assert tab.requests == [file.as_uri()] and tab.trouble == []
        background = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.search(r"\d+", background)[0]) < 100) == (scheme == "dark")
        tab.page.close()


def test_the_pointer_shows_an_epoch_as_text(browser: Browser, run: Path, tmp_path: Path):
    other = make_run(tmp_path / "a <b>name @text {{ x }} $x", 9)
    tab = Tab(browser, write_comparison((run, other), tmp_path / "both.html"))
    tab.open_details()
    tab.drawn()
    tab.page.locator("#chart-0").hover()
    tip = tab.page.locator(".bk-Tooltip:popover-open")
    tip.wait_for(timeout=5_000)
    shown = tip.evaluate("(one) => one.shadowRoot.textContent")
    assert re.search(r"epoch: \d+", shown) and f"{run.name}: " in shown and "a <b>name @text {{ x }} $x: " in shown
    assert tab.trouble == []


def test_odd_logs_open_without_error(browser: Browser, run: Path):
    add_odd_lines(run)
    tab = Tab(browser, write_report(run))
    tab.open_details()
    assert tab.drawn() == 12 and tab.trouble == []


def test_sheets_and_details_by_keyboard(browser: Browser, pages: list):
    run, page = pages[0][0].parent, Tab(browser, pages[0][0]).page
    slider, shown = page.locator("#slider-epoch"), page.locator(".sheet").first.locator("img:visible")
    assert shown.get_attribute("alt") == "Samples, epoch 12"
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "epoch 8" and page.locator("output").first.inner_text() == "epoch 8"
    assert shown.count() == 1 and shown.get_attribute("alt") == "Samples, epoch 8"
    jpeg = (run / "samples" / "epoch-0000008.jpg").read_bytes()
    assert shown.get_attribute("src") == f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    assert shown.evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 640
    page.keyboard.press("Home")
    assert shown.get_attribute("alt") == "Samples, epoch 0"
    rows = page.locator("figure").first.locator("tbody tr")
    assert not rows.first.is_visible()
    page.locator("figure summary").first.focus()
    page.keyboard.press("Enter")
    assert rows.count() == 12 and rows.first.is_visible()


def test_a_watched_page_reloads_and_keeps_what_is_open(browser: Browser, run: Path):
    page = browser.new_page()
    page.clock.install()
    page.goto(write_report(run, watched=True).as_uri())
    page.locator("#other summary").first.click()
    with page.expect_navigation():
        page.clock.fast_forward(31_000)
    assert page.locator("details[open]").count() == 1 and page.locator("#other > details[open]").count() == 1
