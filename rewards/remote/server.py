"""Asks a server for JSON, and asks again if what failed may pass: what `http` and `openai` share."""

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

import requests

from fdfo.config.errors import UserError

LARGEST_ANSWER = 2**20  # bytes
FIRST_WAIT, LONGEST_WAIT = 0.5, 15.0  # seconds before a question is asked again
BUSY = (408, 425, 429, 502, 503, 504)  # statuses of a server that starts, or has too much to do
Message = dict[str, object]


@dataclass(frozen=True)
class Limits:
    """How a server is asked."""

    in_flight: int = 4  # questions at a time
    seconds: float = 120.0  # for one answer
    patience: float = 600.0  # seconds without an answer after which the run ends: a server may be started again
    patience_500: float = 20.0  # seconds after which it ends if the server answers that it has failed


USUAL = Limits()


class MayPass(Exception):
    """A failure that may pass. Its text goes on after 'The server URL'."""

    def __init__(self, text: str, patience: float):
        super().__init__(text)
        self.patience = patience


class Server:
    """A server that answers a JSON message with JSON."""

    def __init__(self, url: str, limits: Limits = USUAL, key: str | None = None):
        """key: sent as a bearer token, and never shown. Raises UserError if nothing listens there."""
        self.url, self.limits, self.key = url, limits, key
        self.troubled = False  # whether the last answer of all was a failure
        self.session = requests.Session()
        self.session.mount(url, requests.adapters.HTTPAdapter(pool_maxsize=limits.in_flight))
        self.session.auth = self._authorize  # in place of .netrc
        self.session.trust_env = urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1")  # no proxy to this machine
        self._check()

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.key is not None:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def _check(self) -> None:
        """Raise UserError if the server does not take a connection, as one with a wrong port. With a proxy there is no telling."""
        if self.session.trust_env and requests.utils.get_environ_proxies(self.url):
            return
        parts = urlsplit(self.url)
        try:
            socket.create_connection((parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), 10).close()
        except (OSError, UnicodeError) as error:
            raise UserError(
                f"Nothing answers at {self.url} ({error}): start the server first, or correct the address."
            ) from error

    def ask_all(self, messages: list[Callable[[], Message]]) -> list[object]:
        """Ask all messages, some at a time, each made just before it is sent; return the answers in order. Raises UserError."""
        stop, pool = threading.Event(), ThreadPoolExecutor(self.limits.in_flight)
        try:
            return [answer.result() for answer in [pool.submit(self._ask, message, stop) for message in messages]]
        finally:
            stop.set()  # after a failure, the other questions wait no longer
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, make: Callable[[], Message], stop: threading.Event) -> object:
        """Ask until there is an answer, or for as long as the failure may last."""
        body, wait, since, patience = json.dumps(make()).encode(), FIRST_WAIT, 0.0, None
        while True:
            started = time.monotonic()
            try:
                answer = self._ask_once(body)
                self.troubled = False
                return answer
            except MayPass as error:
                if error.patience != patience:  # the first failure of this kind
                    since, patience = started, error.patience
                failed = time.monotonic() - since
                if stop.is_set() or failed + wait > patience:
                    raise self._error(
                        f"{error}, for {failed:.0f} seconds", "look at its log, start it again, then resume"
                    ) from None
                self._warn(error)
            stop.wait(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def _ask_once(self, body: bytes) -> object:
        """Ask once. Raises MayPass or UserError."""
        with self._failures():
            deadline = time.monotonic() + self.limits.seconds
            with self.session.post(
                self.url, data=body, headers={"Content-Type": "application/json"}, timeout=self.limits.seconds, stream=True,
                allow_redirects=False,
            ) as response:  # fmt: skip
                content = self._read(response, deadline)
        self._check_status(response.status_code, content)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise self._error(
                f"answered what is no JSON ({self._shown(200, content)})", "check the address and the server"
            ) from None

    def _check_status(self, status: int, content: bytes) -> None:
        """Raise MayPass or UserError unless an answer has the status 200."""
        if status in BUSY:
            raise MayPass(f"is busy (status {status})", self.limits.patience)
        if status >= 500:
            raise MayPass(f"has failed ({self._shown(status, content)})", self.limits.patience_500)
        if status in (401, 403):
            raise self._error(
                f"refuses the key, or wants one (status {status})", "a chat endpoint's is OPENAI_API_KEY, others must want none"
            )
        if status != 200:
            raise self._error(f"refused the request ({self._shown(status, content)})", "correct that, then resume")

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn what the network raises into MayPass, or UserError."""
        try:
            yield
        except requests.exceptions.SSLError as error:
            raise self._error("has no certificate that is trusted", "correct it, or its name") from error
        except requests.Timeout:
            raise MayPass(f"did not answer within {self.limits.seconds:g} seconds", self.limits.patience) from None
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            raise MayPass("cannot be reached, or hung up", self.limits.patience) from None

    def _read(self, response: requests.Response, deadline: float) -> bytes:
        """Read an answer, which must be neither late nor large."""
        content = b""
        for chunk in response.iter_content(2**16):
            content += chunk
            if len(content) > LARGEST_ANSWER:
                raise self._error(f"sent more than {LARGEST_ANSWER:,} bytes for one answer", "check the address and the server")
            if time.monotonic() > deadline:
                raise requests.Timeout
        return content

    def _shown(self, status: int, content: bytes) -> str:
        """Return the start of an answer, without the key, which some servers repeat."""
        text = " ".join(content.decode(errors="replace").split())
        return f"status {status}: {text.replace(self.key, '***') if self.key else text}"[:200]

    def _error(self, failure: str, advice: str) -> UserError:
        return UserError(f"The server {self.url} {failure}: {advice}.")

    def _warn(self, error: MayPass) -> None:
        """Say once that the server is troubled, until it has answered again."""
        if not self.troubled:
            self.troubled = True
            text = f"warning: the server {self.url} {error}; it is asked again for up to {error.patience:g} seconds"
            print(text, file=sys.stderr, flush=True)
