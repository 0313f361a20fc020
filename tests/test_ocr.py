"""`ocr` and `ocr_tesseract`: the score of read lines, prompts, the engines where they are installed, and a run that is judged by them."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_training import log_of, small

from fdfo.config.errors import UserError
from fdfo.config.train_options import SampleConfig
from fdfo.distributed.job import Job
from fdfo.method.trainer import train
from fdfo.storage.prompts import load_prompts
from rewards.registry import build_scorers
from rewards.scorer import check_prompts
from rewards.scorers.ocr import edit_distance, quoted_texts, text_score

sys.path.insert(0, str(ROOT / "benchmarks"))
ENGINES = {"ocr": importlib.util.find_spec("rapidocr") is not None, "ocr_tesseract": shutil.which("tesseract") is not None}


def test_the_distance_of_texts():
    cases = {("", "abc"): 3, ("kitten", "sitting"): 3, ("abc", "abc"): 0, ("ab", "ba"): 2, ("flaw", "lawn"): 2}
    assert {pair: edit_distance(*pair) for pair in cases} == cases


@pytest.mark.parametrize(
    "lines,score",
    [
        (["Open  Late"], 100), (["OPEN", "LATE"], 100), (["menu", "open late"], 100), (["we openlate today"], 100),
        (["opan late"], 100 - 100 / 8), (["open"], 50), ([], 0), (["a quite different and long line"], 0), (["ＯＰＥＮ　ＬＡＴＥ"], 100),
        (["open", "x", "late"], 100 - 100 / 8),
    ],
)  # fmt: skip
def test_the_best_lines_count(lines: list[str], score: float):
    assert text_score('a sign that says "open late"', lines) == pytest.approx(score)


def test_several_texts_and_typographic_quotes():
    assert quoted_texts('a "Red Sign" beside “a Door”, the man\'s "  "') == ["redsign", "adoor"]
    assert text_score('"one" and "two"', ["one", "tw"]) == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_prompts_must_quote_a_text():
    from rewards.scorers.ocr import OcrScorer

    scorer = OcrScorer("nobody", lambda: lambda image: [])
    check_prompts({"ocr": scorer}, load_prompts("ocr"))
    with pytest.raises(UserError, match="'a sign that says open' has no text in quotation marks"):
        check_prompts({"ocr": scorer}, ['"yes"', "a sign that says open"])


def test_the_prompt_set_is_what_its_script_makes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "prompt_sets")
    import ocr

    prompts = load_prompts("ocr")
    assert prompts == ocr.prompts() and len(set(prompts)) == 1000 and all(len(quoted_texts(prompt)) == 1 for prompt in prompts)


@pytest.mark.parametrize(
    "name,says", [("ocr", "pip install -r requirements-ocr.txt"), ("ocr_tesseract", "apt install tesseract-ocr")]
)
def test_an_engine_that_is_missing(name: str, says: str, job: Job, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=says):
        build_scorers([name], job)


@pytest.mark.parametrize("name", ENGINES)
def test_drawn_text_is_read(name: str, job: Job):
    if not ENGINES[name]:
        pytest.skip("the engine is not installed")
    from ocr_reading import draw

    scorer = build_scorers([name], job)[name]
    images = torch.stack([draw(text, 1) for text in ("Open Late", "Opne Late", "Museum", "")] + [draw("Open Late", 15)])
    scores = scorer.score(['a sign that says "open late"'] * 5, images)
    assert scores[0] == scores[4] == 100 and scores[0] > scores[1] > scores[2] and scores[2] < 30 and scores[3] == 0
    assert torch.equal(scorer.score(['a "Museum"'], images[2:3].float() / 255), torch.tensor([100.0]))


@pytest.mark.skipif(not ENGINES["ocr"], reason="RapidOCR is not installed")
def test_a_run_that_is_judged_by_ocr(job: Job, tmp_path: Path):
    """The tiny preset cannot write. So a stand-in writes the text, and misspells it in half of the images (tests/writing.py)."""
    (tmp_path / "prompts.txt").write_text('a sign that says "open late"\na "museum"\na "lemon bread"\na "bridge 12"\n')
    readers = [
        f"tests.writing:{name}" for name, there in (("Rapid", ENGINES["ocr"]), ("Tesseract", ENGINES["ocr_tesseract"])) if there
    ]
    run = train(
        job,
        small(
            tmp_path, reward_specs=(f"{readers[0]}=1.0",), prompt_set=str(tmp_path / "prompts.txt"), eval_prompt_set=str(tmp_path / "prompts.txt"),
            eval_prompts=2, eval_metrics=(*readers[1:], "pixel_diversity"), sample=SampleConfig(num_solver_steps=2, resolution=64),
        ),
    )  # fmt: skip
    (epoch,), evaluations = log_of(run.folder, "epoch"), log_of(run.folder, "eval")
    assert epoch["scores"].keys() == {readers[0]} and 0 < epoch["scores"][readers[0]] < 100 and epoch["differing_pairs"] > 0
    assert {"reward", *readers, "pixel_diversity"} == set(evaluations[-1]["scores"])
