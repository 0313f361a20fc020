"""The vote page: the file of votes, the ballot's rules, the HTTP interface, and, where there is a Chromium, the page itself."""

import dataclasses
import http.client
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, sync_playwright

from fdfo.config.errors import UserError
from fdfo.vote_page.ballot import GONE, PATIENCE, Ballot, Refused, Showing, left_branch, uniform
from fdfo.vote_page.desk import DeskSettings, VoteDesk
from fdfo.vote_page.votes_file import Vote, VotesFile, pair_values, read_votes

CHROMIUM = shutil.which("chromium")
MARKUP = "<img src=x onerror=alert(1)> <b>bold</b> & </script>"
VOTE = Vote(6, 0, 12, "a ring – é", "first", "second", "Ann", 1, 1.5, "2026-01-01T00:00:00Z")


def but(**values: object) -> Vote:
    return dataclasses.replace(VOTE, **values)


# ---------------------------------------------------------------------------------------------------------------------
# votes.jsonl


def test_votes_are_read_as_written_and_a_torn_line_is_dropped(tmp_path: Path):
    path = tmp_path / "votes.jsonl"
    votes = [VOTE, but(pair=3, choice="tie", seconds=0.25), but(pair=3, choice="undo")]
    for vote in votes[:2]:
        VotesFile(path).append(vote)
    assert json.loads(path.read_text().splitlines()[0]) == dataclasses.asdict(VOTE)
    with path.open("a") as file:
        file.write('{"seed": 6, "epoch": 0, "pa')
    assert read_votes(path) == votes[:2]
    file = VotesFile(path)
    file.append(votes[2])
    assert read_votes(path) == file.votes == votes
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))  # as some editors leave it
    assert read_votes(path) == votes
    VotesFile(path).append(VOTE)
    assert read_votes(path) == [*votes, VOTE]


@pytest.mark.parametrize("line", ["no json", '{"seed": 6}', "", json.dumps(dataclasses.asdict(VOTE) | {"choice": "left"})])
def test_any_other_broken_line_is_named(tmp_path: Path, line: str):
    path = tmp_path / "votes.jsonl"
    good = json.dumps(dataclasses.asdict(VOTE))
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError, match=r"Line 2 of .*votes.jsonl is no vote"):
        read_votes(path)


def test_a_vote_that_cannot_be_written_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = VotesFile(tmp_path / "votes.jsonl")
    file.append(VOTE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="No space left"):
            file.append(but(pair=1))
    file.append(but(pair=2))
    assert [vote.pair for vote in read_votes(file.path)] == [12, 2] == [vote.pair for vote in file.votes]


def test_the_value_of_a_pair_is_the_mean_of_its_standing_votes():
    votes = [
        but(pair=0), but(pair=1, choice="second"), but(pair=2, choice="tie"), but(pair=3, choice="both_bad"),
        but(pair=4), but(pair=4, showing=2, choice="tie"),
        but(pair=5), but(pair=5, choice="undo"), but(pair=5, choice="second"),
        but(pair=6), but(pair=6, choice="undo"),
        but(pair=7), but(pair=7, choice="undo", person="Bo"), but(pair=8, epoch=1),
    ]  # fmt: skip
    assert pair_values(votes, 0) == {0: 1, 1: -1, 2: 0, 3: 0, 4: 0.5, 5: -1, 7: 1}


# ---------------------------------------------------------------------------------------------------------------------
# the ballot


def ballot(total: int = 8, twice: float = 0.0) -> Ballot:
    made = Ballot(6, 0, total, twice)
    for pair in range(total):
        made.offer(pair)
    return made


def pairs_of(showings: list[Showing]) -> list[int]:
    return [showing.pair for showing in showings]


def test_a_pair_goes_to_one_person():
    votes = ballot()
    assert pairs_of(votes.give("a", "Ann", [], 3, 0)) == [0, 1, 2]
    assert pairs_of(votes.give("b", "Bo", [], 3, 0)) == [3, 4, 5]
    assert pairs_of(votes.give("a", "Ann", [Showing(1, 1)], 3, 1)) == [1, 0, 2]
    with pytest.raises(Refused, match="someone else"):
        votes.check(Showing(0, 1), "b", 1)
    votes.check(Showing(6, 1), "b", 1)  # as after a restart, which forgets who has what
    votes.answer(Showing(0, 1), "a", "Ann", 1)
    for showing, says in {Showing(0, 1): "vote already", Showing(9, 1): "not open", Showing(1, 2): "not open"}.items():
        with pytest.raises(Refused, match=says):
            votes.check(showing, "a", 1)
    assert votes.left() == 7


def test_a_pair_comes_back_without_an_answer_or_without_its_tab():
    votes, late = ballot(4), PATIENCE + 20
    votes.give("a", "Ann", [], 2, 0)
    votes.see("a", GONE - 1)
    assert pairs_of(votes.give("b", "Bo", [], 4, GONE + 1)) == [2, 3]
    assert pairs_of(votes.give("b", "Bo", [], 4, 2 * GONE)) == [0, 1, 2, 3]  # the tab a asks no more

    votes = ballot(4)
    votes.give("a", "Ann", [], 4, 0)
    votes.answer(Showing(0, 1), "a", "Ann", 20)
    votes.see("a", late - 1)
    assert pairs_of(votes.give("b", "Bo", [], 4, late - 1)) == []  # an answer renews the others
    votes.see("a", late + 1)
    votes.give("a", "Ann", [Showing(1, 1)], 1, late + 1)  # asking does not
    assert pairs_of(votes.give("b", "Bo", [], 1, late + 1)) == [1]
    votes.check(Showing(2, 1), "a", late + 1)  # too late, and yet nobody else has it


def test_after_a_restart_a_tab_keeps_what_it_held():
    votes = Ballot(6, 0, 4, 0)
    assert votes.give("a", "Ann", [Showing(2, 1), Showing(9, 1)], 4, 0) == []
    for pair in range(4):
        votes.offer(pair)
    assert pairs_of(votes.give("b", "Bo", [], 4, 1)) == [0, 1, 3]
    assert pairs_of(votes.give("a", "Ann", [], 4, 1)) == [2]


def test_repeats_come_when_all_pairs_are_there_to_the_same_person_first():
    votes = Ballot(6, 0, 4, 1.0)
    assert votes.left() == 8 and len(Ballot(6, 0, 1000, 0.25).showings) in range(1200, 1300)
    for pair in range(3):
        votes.offer(pair)
    for pair, tab, person in ((0, "a", "Ann"), (1, "b", "Bo")):
        votes.answer(Showing(pair, 1), tab, person, 0)
    assert votes.open_showings("Bo") == [Showing(2, 1)]
    votes.offer(3)
    assert votes.open_showings("Bo") == [Showing(2, 1), Showing(3, 1), Showing(1, 2), Showing(0, 2)]


def test_taking_back_goes_from_vote_to_vote_of_the_same_person():
    votes = ballot(4)
    for pair, tab, person in ((0, "a", "Ann"), (1, "b", "Bo"), (2, "a", "Ann")):
        votes.answer(Showing(pair, 1), tab, person, 0)
    for pair in (2, 0):
        assert votes.last_of("Ann") == Showing(pair, 1)
        votes.take_back(votes.last_of("Ann"), "a", 0)
    assert votes.left() == 3 and pairs_of(votes.give("b", "Bo", [], 4, 0)) == [3]
    with pytest.raises(Refused, match="no vote"):
        votes.last_of("Ann")


def test_sides_are_even_and_always_the_same():
    sides = [left_branch(6, epoch, Showing(pair, 1)) for epoch in range(20) for pair in range(100)]
    assert 900 < sides.count("first") < 1100
    assert uniform("side", 6, 0, 12, 1) == pytest.approx(0.79035, abs=1e-5)  # a restart must not swap the sides


# ---------------------------------------------------------------------------------------------------------------------
# over HTTP


class Client:
    """Talks to a desk as a page does."""

    def __init__(self, desk: VoteDesk, person: str = "Ann", tab: str = "a"):
        self.port, self.who = desk.server.port, {"person": person, "tab": tab}

    def ask(self, path: str, message: object = None, **headers: str) -> tuple[int, dict | bytes]:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        if message is None:
            link.request("GET", path, headers=headers)
        else:
            headers.setdefault("content-type", "application/json")
            link.request("POST", path, message if isinstance(message, str) else json.dumps(message), headers)
        answer = link.getresponse()
        self.headers, body = answer.headers, answer.read()
        link.close()
        return answer.status, json.loads(body) if "json" in answer.headers["content-type"] else body

    def pairs(self, most: int = 3) -> list[dict]:
        return self.ask("/pairs", self.who | {"held": [], "most": most})[1]["pairs"]

    def vote(self, pair: dict, choice: str = "left", **changed: object) -> tuple[int, dict]:
        place = [pair["epoch"], pair["pair"], pair["showing"]]
        return self.ask("/vote", self.who | {"showing": place, "choice": choice, "seconds": 1.5} | changed)


def offer_all(desk: VoteDesk, total: int, epoch: int = 0, prompt: str = MARKUP, size: int = 16) -> None:
    desk.open_epoch(epoch, total)
    for pair, images in enumerate(noise(total, size)):
        desk.offer(pair, f"{prompt} {pair}", images)


def noise(total: int, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (total, 2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def open_desk(tmp_path: Path) -> Iterator[Callable[..., VoteDesk]]:
    """open_desk(total, host=..., ...) -> a desk with so many pairs on offer, None: no open epoch; again: the same run, resumed."""
    desks = []

    def make(total: int | None = 6, **settings: object) -> VoteDesk:
        for desk in desks:
            desk.close()
        desks[:] = [VoteDesk(tmp_path, DeskSettings(**({"port": 0, "seed": 6, "epochs": 3} | settings)))]
        if total is not None:
            offer_all(desks[0], total)
        return desks[0]

    yield make
    for desk in desks:
        desk.close()


def test_a_vote_is_on_disk_before_its_answer(open_desk: Callable):
    desk = open_desk()
    client = Client(desk)
    first, second, *_ = client.pairs()
    assert first["prompt"] == f"{MARKUP} 0" and desk.values() == {} and desk.left() == 6
    status, image = client.ask(f"/{first['left']}")
    branch = {"first": 0, "second": 1}[left_branch(6, 0, Showing(0, 1))]
    assert status == 200 and image == (desk.images / "0" / f"0-{branch}.jpg").read_bytes()

    before = desk.last_answer()
    assert client.vote(first, "right") == (200, {"kept": True})
    (line,) = read_votes(desk.file.path)
    assert (line.choice == line.left) is False and line.person == "Ann" and line.seconds == 1.5 and line.prompt == first["prompt"]
    assert desk.values() == {0: 1.0 if line.choice == "first" else -1.0} and desk.left() == 5 and desk.last_answer() > before
    for pair, choice in ((second, "tie"), (second | {"pair": 2}, "both_bad")):
        assert client.vote(pair, choice)[0] == 200
    assert client.ask("/undo", client.who)[1]["pair"]["pair"] == 2
    assert desk.values().keys() == {0, 1} and desk.values()[1] == 0 and desk.left() == 4
    assert desk.close_epoch() == desk.values()
    assert client.pairs() == [] and client.vote(second | {"pair": 3})[0] == 409


def test_wrong_votes_are_refused_with_a_sentence_and_change_nothing(open_desk: Callable):
    desk = open_desk()
    ann, bo = Client(desk), Client(desk, "Bo", "b")
    mine, theirs = ann.pairs(1)[0], bo.pairs(1)[0]
    ann.vote(mine)
    kept = desk.file.path.read_bytes()
    free = {"epoch": 0, "pair": 5, "showing": 1}
    answers = [
        (ann.vote(mine), "vote already"),
        (ann.vote(theirs), "someone else"),
        (ann.vote(free | {"pair": 77}), "not open"),
        (ann.vote(free | {"epoch": 2}), "Epoch 3 is not open: epoch 1 is"),
        (ann.vote(free | {"showing": 2}), "not open"),
        (bo.ask("/undo", bo.who), "no vote in this epoch"),
    ]
    malformed = [{"choice": "first"}, {"seconds": -1}, {"seconds": "NaN"}, {"person": ""}, {"person": "a\nb"}, {"tab": "x" * 99}]
    for changed in (*malformed, {"showing": [0, 5]}, {"showing": [0, -5, 1]}, {"more": 1}):
        answers.append((ann.vote(free, **changed), "malformed"))
    answers += [(ann.ask("/vote", body), "malformed") for body in ("", "[]", "null", "{", '{"a":' * 5000)]
    for (status, answer), says in answers:
        assert status == 409 and says in answer["error"] and answer["error"].endswith("."), (answer, says)
    assert desk.file.path.read_bytes() == kept and desk.left() == 5
    assert ann.vote(free)[0] == 200


def test_a_page_of_another_site_reaches_nothing(open_desk: Callable):
    desk = open_desk()
    client = Client(desk)
    for host in ("evil.example", "evil.example:80", "[::1", "", "127.0.0.1.evil.example"):  # DNS rebinding
        for path in ("/", "/state", "/page.js", "/images/0/0-0.jpg"):
            assert client.ask(path, host=host)[0] == 403
    for host in (f"localhost:{client.port}", "127.0.0.1:9000", "[::1]:9000"):  # 9000: through a tunnel
        assert client.ask("/state", host=host)[0] == 200
    message = client.who | {"showing": [0, 0, 1], "choice": "left", "seconds": 1}
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{client.port}", "http://127.0.0.1:1"):
        assert client.ask("/vote", message, origin=origin)[0] == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert client.ask("/vote", message, **{"content-type": kind})[0] == 415
    assert desk.left() == 6
    assert client.ask("/vote", message, origin=f"http://127.0.0.1:{client.port}")[0] == 200
    assert (
        "default-src 'none'" in client.headers["content-security-policy"]
        and client.headers["x-content-type-options"] == "nosniff"
    )


def test_another_host_needs_the_token_everywhere(open_desk: Callable):
    desk = open_desk(host="0.0.0.0")
    client, token = Client(desk), desk.url.partition("?token=")[2]
    assert len(token) >= 32
    paths = ("/", "/page.css", "/page.js", "/learning.js", "/state", "/images/0/0-0.jpg", "/nowhere")
    for wrong in ("", "?token=", "?token=x", f"?token={token[:-1]}", "?token=%ff"):
        assert {client.ask(path + wrong)[0] for path in paths} == {403}
        assert {client.ask(path + wrong, client.who)[0] for path in ("/pairs", "/vote", "/undo")} == {403}
        assert "set-cookie" not in client.headers
    assert client.ask(f"/?token={token}")[0] == 200
    cookie = client.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    cookie = cookie.partition(";")[0]
    assert [client.ask(path, cookie=cookie)[0] for path in paths] == [200] * 6 + [404]
    assert client.ask("/pairs", client.who | {"held": [], "most": 1}, cookie=cookie)[0] == 200
    assert client.ask("/state", cookie=f"{cookie}x")[0] == 403
    assert (desk.images / "token").stat().st_mode & 0o077 == 0
    assert open_desk(host="0.0.0.0").url.endswith(token)  # an open page goes on after a restart


def test_only_images_are_served(open_desk: Callable):
    client = Client(open_desk())
    for path in (
        "/images/../votes.jsonl",
        "/images/..%2f..%2fvotes/0-0.jpg",
        "/images/0/..%2f0%2f0-0.jpg",
        "/images/0/9-0.jpg",
        "/votes",
    ):
        assert client.ask(path)[0] == 404


def test_a_restart_keeps_votes_and_opens_the_rest(open_desk: Callable):
    desk = open_desk(6, shown_twice=0.5)
    client = Client(desk)
    for pair in client.pairs(4):
        client.vote(pair, "tie")
    left, again = desk.left(), open_desk(6, shown_twice=0.5)
    assert again.left() == left and again.values() == dict.fromkeys(range(4), 0)
    client = Client(again)
    assert client.ask("/undo", client.who)[1]["pair"]["pair"] == 3
    assert [pair["pair"] for pair in client.pairs(2)] == [3, 4]
    again.close_epoch()
    again.open_epoch(1, 6)
    assert again.values() == {}


def test_what_the_trainer_does_is_told(open_desk: Callable, tmp_path: Path):
    desk = open_desk()
    desk.tell("sampling", 0, 8, "batches")
    desk.tell("sampling", 5, 8, "batches")
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    for epoch in (0, 5):
        desk.tell_evaluation(epoch, {"scene": 68.5 + epoch}, ["a", MARKUP], images)
    state = Client(desk).ask("/state?tab=a")[1]
    assert state["stage"] == {"name": "sampling", "done": 5, "total": 8, "unit": "batches"} and state["seconds_left"] >= 0
    assert state["epoch"] == 0 and state["left"] == state["showings"] == 6 and state["people"] == 1
    assert [one["scores"]["scene"] for one in state["evaluations"]] == [68.5, 73.5]
    again = Client(open_desk())  # resumed in the first epoch: the later evaluation is done again
    state = again.ask("/state")[1]
    assert [one["epoch"] for one in state["evaluations"]] == [0] and state["heldout_prompts"] == ["a", MARKUP]
    assert again.ask("/images/held-out/0-1.jpg")[0] == 200


def test_a_desk_that_cannot_be_is_one_sentence(open_desk: Callable, tmp_path: Path):
    desk = open_desk()
    for settings, says in {
        DeskSettings(port=desk.server.port): "cannot be served on 127.0.0.1 port",
        DeskSettings(host="nowhere.invalid", port=0): "cannot be served on nowhere.invalid",
    }.items():
        (tmp_path / "other").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=says):
            VoteDesk(tmp_path / "other", settings)
    Client(desk).vote({"epoch": 0, "pair": 0, "showing": 1})
    with pytest.raises(UserError, match="votes for the seed 6, not 7"):
        VoteDesk(tmp_path, DeskSettings(port=0, seed=7))


# ---------------------------------------------------------------------------------------------------------------------
# in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.fixture
def open_tab(browser: Browser) -> Iterator[Callable[..., Page]]:
    """open_tab(desk, person, ...) -> a page of its own browser window. At the end none may have complained or asked elsewhere."""
    trouble, requests, hosts, windows = [], [], set(), []

    def make(desk: VoteDesk, person: str = "Ann", width: int = 1280, scheme: str = "light") -> Page:
        window = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        windows.append(window)
        hosts.add(f"http://127.0.0.1:{desk.server.port}/")
        page = window.new_page()
        page.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(desk.url)
        if person:
            page.locator("#name").fill(person)
            page.keyboard.press("Enter")
            page.locator(".pair img").first.wait_for()
        return page

    yield make
    for window in windows:
        window.close()
    elsewhere = [url for url in requests if not url.startswith(("data:", *hosts))]
    assert elsewhere == [] and [line for line in trouble if not re.search("ERR_CONNECTION_REFUSED|503", line)] == []


def wait_for(page: Page, condition: str) -> None:
    """Wait until an expression is true. Playwright's own wait is eval, which the page's security policy forbids."""
    end = time.monotonic() + 15
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(10)


def wait_left(page: Page, left: int) -> None:
    wait_for(page, f"!busy && document.title.startsWith('{left} left')")


def test_the_page_works_by_keyboard_alone(open_desk: Callable, open_tab: Callable):
    desk = open_desk(6)
    page = open_tab(desk)
    prompt = page.locator("#prompt")
    for i, (key, choice) in enumerate(
        {"ArrowLeft": "left", "ArrowRight": "right", "ArrowUp": "tie", " ": "tie", "b": "both_bad"}.items()
    ):
        wait_left(page, 6 - i)
        assert prompt.inner_text() == f"{MARKUP} {i}"  # as text, in the order in which they came
        page.keyboard.press(key)
        wait_left(page, 5 - i)
        vote = desk.file.votes[-1]
        side = {vote.left: "left"}.get(vote.choice, vote.choice if vote.choice in ("tie", "both_bad") else "right")
        assert (vote.pair, side, vote.person) == (i, choice, "Ann") and 0 < vote.seconds < 60
    page.keyboard.press("Backspace")
    wait_left(page, 2)
    assert prompt.inner_text() == f"{MARKUP} 4" and page.locator("#said").inner_text() == "Taken back: choose again"
    page.locator(".pair button").first.focus()
    page.keyboard.press("Space")  # presses the button
    wait_left(page, 1)
    assert desk.file.votes[-1].choice == desk.file.votes[-1].left
    page.locator(".keys [data-choice=tie]").click()
    page.locator("#wait").wait_for()
    assert desk.left() == 0 and page.locator("b", has_text="bold").count() == 0
    desk.close_epoch()
    desk.tell("training", 1, 4, "steps")
    page.locator("#waiting", has_text="Training on your choices").wait_for()
    offer_all(desk, 3, epoch=1)
    wait_left(page, 3)
    assert page.locator("#epoch").inner_text() == "Epoch 2 of 3"


def test_a_pair_is_shown_at_full_size_without_a_wait(open_desk: Callable, open_tab: Callable):
    desk = open_desk(0)
    page = open_tab(desk, person="")
    page.locator("#name").fill("Ann")
    page.keyboard.press("Enter")
    offer_all(desk, 3, size=320)
    page.locator(".pair img").first.wait_for()
    size = page.locator(".pair img").first.bounding_box()
    assert (size["width"], size["height"]) == (320, 320)
    wait_for(page, "queue.length === 3 && queue.every((pair) => pair.loaded)")
    asked = []
    page.on("request", lambda request: asked.append(request.url.rpartition("/")[2]))
    for left in (2, 1):
        page.keyboard.press("ArrowLeft")
        wait_left(page, left)
    assert not [name for name in asked if name.endswith(".jpg")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_page_does_not_scroll_sideways(open_desk: Callable, open_tab: Callable, scheme: str):
    desk = open_desk(2)
    images = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    for epoch in (0, 5):
        desk.tell_evaluation(epoch, {"scene": 68.5 + epoch}, ["a", MARKUP, "word" * 100], images)
    desk.open_epoch(5, 1)
    desk.offer(0, "long " * 300 + "unbroken" * 50, images[:2])
    page = open_tab(desk, width=360, scheme=scheme)
    for width in (360, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.search(r"\d+", background)[0]) < 100) == (scheme == "dark")
    strip = page.locator("#strip figure")
    assert strip.count() == 3 and strip.nth(1).locator("figcaption").inner_text() == MARKUP
    assert page.locator("#curves p").inner_text() == "73.5 +5 since epoch 0"
    page.locator("#slider").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#chosen").inner_text() == "before, and after 0 epochs"
    assert strip.first.locator("img").nth(1).get_attribute("src") == "images/held-out/0-0.jpg" and desk.left() == 1


def test_two_people_judge_each_pair_once_and_a_restart_loses_nothing(open_desk: Callable, open_tab: Callable):
    desk = open_desk(20)
    ann, bo = open_tab(desk), open_tab(desk, "Bo")
    port = desk.server.port
    for page in (ann, bo, ann, bo):
        before = desk.left()
        page.keyboard.press("ArrowLeft")
        wait_for(page, "!busy")
        assert desk.left() == before - 1
    desk.close()
    ann.keyboard.press("ArrowRight")  # while nobody listens
    ann.locator(".trouble", has_text="does not answer").wait_for()
    again = open_desk(None, port=port)
    ann.locator(".trouble", has_text="is starting").wait_for()
    again.open_epoch(0, 20)
    ann.locator(".trouble", has_text="not drawn yet").wait_for()
    wait_for(ann, "!restarted && !asking")
    for pair, images in enumerate(noise(20)):
        again.offer(pair, f"{MARKUP} {pair}", images)
    wait_for(ann, "!busy")
    for page in (ann, bo):
        wait_left(page, 15)
    bo.keyboard.press("ArrowLeft")
    wait_left(bo, 14)
    votes = read_votes(again.file.path)
    assert len(votes) == 6 == len({vote.pair for vote in votes}) and [vote.person for vote in votes].count("Ann") == 3
