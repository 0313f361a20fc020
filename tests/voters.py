"""People who judge over HTTP as the page does: they fetch the images, look at them with `scene`, and now and then choose wrongly."""

import io
import json
import threading
import time
import urllib.error
import urllib.request
import zlib

import numpy as np
import torch
from PIL import Image

from rewards.scene import SceneScorer


class Voter(threading.Thread):
    """Somebody at the page until the run ends. Their choice depends on the images alone, so it is the same whoever judges."""

    def __init__(self, url: str, person: str, most: int = 10**9, wrong: float = 0.1):
        super().__init__(daemon=True)
        self.url, self.person, self.most, self.wrong = url, person, most, wrong
        self.kept: list[tuple[int, int, int]] = []  # epoch, pair, showing of every vote that was taken
        self.refused: list[str] = []
        self.start()

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

    def run(self) -> None:
        who = {"person": self.person, "tab": self.person}
        while len(self.kept) < self.most:
            try:
                pairs = json.loads(self.ask("pairs", who | {"held": [], "most": 1}))["pairs"]
                for shown in pairs:
                    place = [shown["epoch"], shown["pair"], shown["showing"]]
                    self.ask("vote", who | {"showing": place, "choice": self.choice(shown), "seconds": 0.5})
                    self.kept.append(tuple(place))
                if not pairs:
                    time.sleep(0.05)
            except urllib.error.HTTPError as error:  # an epoch that closes meanwhile, say
                self.refused.append(error.read().decode())
            except OSError:  # the page is not there yet, or no more
                time.sleep(0.05)
