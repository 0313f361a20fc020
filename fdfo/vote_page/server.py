"""The web server: the page, its images, and four questions in JSON (Starlette on uvicorn, in a thread)."""

import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import uvicorn
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from fdfo.config.errors import UserError
from fdfo.distributed.port import open_port
from fdfo.vote_page.access import Access, Gate
from fdfo.vote_page.ballot import NotYet, Refused
from fdfo.vote_page.votes_file import Number, Person

if TYPE_CHECKING:
    from fdfo.vote_page.desk import VoteDesk

HERE = Path(__file__).parent
PAGE_FILES = {"/": "page.html"} | {f"/{name}": name for name in ("page.css", "page.js", "learning.js")}
Place = tuple[Number, Number, Annotated[int, Field(ge=1, le=2)]]  # epoch, pair, showing
Tab = Annotated[str, Field(min_length=1, max_length=60)]
T = TypeVar("T")


@dataclass(frozen=True)
class Message:
    """What every post says: who asks, and from which tab of a browser."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    person: Person
    tab: Tab


@dataclass(frozen=True)
class Ask(Message):
    """Give me pairs. held: those that I have already; most: how many I want to hold."""

    held: Annotated[list[Place], Field(max_length=100)]
    most: Annotated[int, Field(ge=1, le=20)]


@dataclass(frozen=True)
class Choose(Message):
    """My choice on a pair that I have."""

    showing: Place
    choice: Literal["left", "right", "tie", "both_bad"]
    seconds: Annotated[float, Field(ge=0, le=1e6)]


def read_message(kind: type[T], body: bytes) -> T:
    """Read a message of the page. Raises Refused for any other."""
    try:
        return TypeAdapter(kind).validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise Refused(f"The message is malformed ({'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}).") from None


def build_app(desk: "VoteDesk", access: Access, port: int) -> Starlette:
    """Return the app of a desk."""

    async def file(request: Request) -> Response:
        if request.url.path == "/":
            desk.somebody_came()
        return FileResponse(HERE / PAGE_FILES[request.url.path])

    async def image(request: Request) -> Response:
        folder, name = request.path_params["folder"], request.path_params["name"]
        path = desk.images / folder / f"{name}.jpg"
        plain = folder.replace("held-out", "0").isdecimal() and name.replace("-", "").isdecimal()
        return FileResponse(path) if plain and path.is_file() else JSONResponse({"error": "There is no such image."}, 404)

    async def state(request: Request) -> Response:
        return JSONResponse(desk.state(request.query_params.get("tab", "")))

    async def pairs(request: Request) -> Response:
        ask = read_message(Ask, await request.body())
        return JSONResponse({"pairs": desk.give(ask.person, ask.tab, ask.held, ask.most)})

    async def vote(request: Request) -> Response:
        said = read_message(Choose, await request.body())
        await run_in_threadpool(desk.vote, said.person, said.tab, said.showing, said.choice, said.seconds)
        return JSONResponse({"kept": True})

    async def undo(request: Request) -> Response:
        said = read_message(Message, await request.body())
        return JSONResponse({"pair": await run_in_threadpool(desk.take_back, said.person, said.tab)})

    routes = [Route(path, file) for path in PAGE_FILES]
    routes += [Route("/images/{folder}/{name}.jpg", image), Route("/state", state)]
    routes += [Route(f"/{end.__name__}", end, methods=["POST"]) for end in (pairs, vote, undo)]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Gate, access=access, port=port)],
        exception_handlers={Refused: refused, NotYet: not_yet, UserError: not_kept},
    )


async def refused(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 409)


async def not_yet(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 503)


async def not_kept(_: Request, error: Exception) -> Response:
    """Answer that a vote could not be written; the page asks again."""
    print(f"warning: {error}", flush=True)
    return JSONResponse({"error": str(error)}, 503)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises UserError if the port cannot be had."""
    return open_port("The page for votes", host, port, "--human-port, or --human-host")


class Server:
    """The app on a port, in a thread that ends with close() or with the process."""

    def __init__(self, desk: "VoteDesk", access: Access, port: int):
        """port 0: any free one. Raises UserError if it cannot be had."""
        self.access, self.socket = access, listen(access.host, port)
        self.port = self.socket.getsockname()[1]
        config = uvicorn.Config(
            build_app(desk, access, self.port), log_config=None, access_log=False, lifespan="off", ws="none", loop="asyncio", http="h11",
            server_header=False, proxy_headers=False, timeout_graceful_shutdown=2,
        )  # fmt: skip
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.uvicorn.started and self.thread.is_alive():
            time.sleep(0.01)

    @property
    def url(self) -> str:
        host = socket.gethostname() if self.access.host in ("0.0.0.0", "::") else self.access.host  # noqa: S104
        address = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"
        return address if self.access.token is None else f"{address}?token={self.access.token}"

    def close(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()
        self.socket.close()
