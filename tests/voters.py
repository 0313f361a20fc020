"""People who judge over HTTP as the page does: they fetch the images, look at them with `scene`, and now and then choose wrongly."""

import io
import json
import socket
import threading
import urllib.error
import urllib.request
import zlib

import numpy as np
import torch
from PIL import Image

from rewards.scorers.scene import SceneScorer


class Voter:
    """Somebody at the page. Their choice depends on the images alone, so it is the same whoever judges."""

    def __init__(self, url: str, person: str = "Ann", wrong: float = 0.1):
        self.url, self.person, self.wrong = url, person, wrong
        self.kept: list[tuple[int, int, int]] = []  # epoch, pair, showing of every vote that was taken
        self.refused: list[str] = []

    def ask(self, path: str, message: dict | None = None) -> bytes:
        body = None if message is None else json.dumps(message).encode()
        request = urllib.request.Request(self.url + path, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read()

    def image(self, path: str) -> torch.Tensor:
        return torch.from_numpy(np.array(Image.open(io.BytesIO(self.ask(path))))).permute(2, 0, 1)

    def choice(self, shown: dict) -> str:
        images = torch.stack([self.image(shown[side]) for side in ("left", "right")])
        left, right = SceneScorer().score([shown["prompt"]] * 2, images).tolist()
        if left == right:
            return "tie"
        better = left > right
        if zlib.crc32(images[:, :, ::2].sum(0).numpy().tobytes()) / 2**32 < self.wrong:  # the same on either side
            better = not better
        return "left" if better else "right"

    def vote(self, most: int = 10**9) -> bool:
        """Vote on pairs until there are none, or `most` votes were taken in all; False if there was nothing to do."""
        who, before = {"person": self.person, "tab": self.person}, len(self.kept)
        while len(self.kept) < most:
            pairs = json.loads(self.ask("pairs", who | {"held": [], "most": 1}))["pairs"]
            if not pairs:
                break
            (shown,) = pairs
            place = [shown["epoch"], shown["pair"], shown["showing"]]
            try:
                self.ask("vote", who | {"showing": place, "choice": self.choice(shown), "seconds": 0.5})
                self.kept.append(tuple(place))
            except urllib.error.HTTPError as error:  # the epoch was closed meanwhile, say
                self.refused.append(error.read().decode())
        return len(self.kept) > before


class Voting(threading.Thread):
    """A voter in a thread of its own, until the block ends; a page that is not there yet is waited for."""

    def __init__(self, port: int, person: str = "Ann", most: int = 10**9):
        super().__init__(daemon=True)
        self.voter, self.most, self.over = Voter(f"http://127.0.0.1:{port}/", person), most, threading.Event()

    def run(self) -> None:
        while len(self.voter.kept) < self.most and not self.over.is_set():
            try:
                busy = self.voter.vote(self.most)
            except OSError:
                busy = False
            if not busy:
                self.over.wait(0.03)

    def __enter__(self) -> Voter:
        self.start()
        return self.voter

    def __exit__(self, *failure: object) -> None:
        self.over.set()
        self.join()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
