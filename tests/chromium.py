"""Headless Chromium over its debugging pipe: pages opened from disk, with what they say, what they ask for, and real keys."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """One tab. console: what pages said, warnings and errors included. requests: every URL that they asked for, data: left out."""

    def __init__(self, profile: Path):
        own_read, chromium_writes = os.pipe()
        chromium_reads, self.pipe_in = os.pipe()

        def place() -> None:  # Chromium reads descriptor 3 and writes 4
            ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (chromium_reads, chromium_writes)]
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(command, preexec_fn=place, pass_fds=(3, 4), **quiet)
        os.close(chromium_reads)
        os.close(chromium_writes)
        self.pipe_out, self.buffer, self.number, self.session = own_read, b"", 0, None
        self.console, self.requests, self.loaded = [], [], False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.pipe_in)
        os.close(self.pipe_out)
        self.process.kill()
        self.process.wait()

    def send(self, method: str, **parameters: object) -> dict:
        """A command of the DevTools protocol, and its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.pipe_in, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def receive(self, seconds: float = 60) -> dict:
        """The next message; events are noted on the way."""
        while b"\0" not in self.buffer:
            assert select.select([self.pipe_out], [], [], seconds)[0], "Chromium does not answer"
            self.buffer += os.read(self.pipe_out, 2**20)
        text, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(text)
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.consoleAPICalled":
            self.console.append(str(parameters["args"]))
        elif method == "Runtime.exceptionThrown":
            self.console.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.console.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not parameters["request"]["url"].startswith("data:"):
            self.requests.append(parameters["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loaded = True
        return message

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Opens a file in a window of that size, and waits until it is loaded and drawn."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.loaded = False
        self.send("Page.navigate", url=page.absolute().as_uri())
        end = time.monotonic() + 60
        while not self.loaded and time.monotonic() < end:
            self.receive()
        self.settle()

    def settle(self) -> None:
        """Returns once the page has dealt with what happened before, and is drawn."""
        self.run("new Promise((done) => setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(() => done(0))), 50))")

    def run(self, script: str) -> object:
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, *keys: str) -> None:
        """Real key presses; Tab moves the focus."""
        codes = {"Tab": 9, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Enter": 13, " ": 32}
        for key in keys:
            text = {"Enter": "\r", " ": " "}.get(key, "")
            same = dict(key=key, code="Space" if key == " " else key, windowsVirtualKeyCode=codes[key])
            self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **same)
            self.send("Input.dispatchKeyEvent", type="keyUp", **same)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """What the window shows, or the whole page, as PNG."""
        picture = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))
