"""Who may talk to the page: everybody on this machine, and from elsewhere whoever has the token.

On the loopback the name of the host is checked, so that no other site can reach the page by a name of its own (DNS rebinding).
Everywhere a post must come from the page itself: JSON, and of the same origin if the browser names one.
"""

import ipaddress
import secrets
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fdfo.config.errors import UserError

TOKEN_FILE = "token"  # noqa: S105
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Access:
    """The host that is served, and the token that it needs; None on the loopback."""

    host: str
    token: str | None

    @classmethod
    def make(cls, host: str, folder: Path) -> "Access":
        """Return the access for a host. Its token is kept in the folder, so that pages go on after a restart. Raises UserError."""
        if is_loopback(host):
            return cls(host, None)
        path = folder / TOKEN_FILE
        try:
            if not path.exists():
                path.touch(mode=0o600)
                path.write_text(secrets.token_urlsafe(24), encoding="utf-8")
            return cls(host, path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path} cannot be used ({error.strerror}): make it readable and writable.") from error

    def refusal(self, request: Request, cookie: str) -> tuple[int, str] | None:
        """Return why a request is refused, as status and sentence; None if it is not. cookie: name of the one with the token."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if self.token is None:
            if not is_loopback(host_name(host)):
                return 403, "This page answers under the name of this machine alone: open the address that the run printed."
        else:
            given = request.query_params.get("token") or request.cookies.get(cookie, "")
            if not secrets.compare_digest(given.encode(), self.token.encode()):
                return 403, "The token is missing or wrong: open the whole address that the run printed."
        if request.method in ("GET", "HEAD"):
            return None
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return 415, "Send JSON, with its content type."
        if origin is not None and origin != f"http://{host}":
            return 403, "This request comes from another site."
        return None


def is_loopback(host: str) -> bool:
    """Return whether a name or address can only mean this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def host_name(header: str) -> str:
    """Return the name or address in a Host header, without its port; an empty one if it is malformed."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


class Gate:
    """ASGI middleware: refuses, sets the cookie for a token in the address, and adds the headers of every answer."""

    def __init__(self, app: ASGIApp, access: Access, port: int):
        self.app, self.access, self.cookie = app, access, f"fdfo_{port}"  # a browser keeps cookies by host, whatever the port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if refusal is None and self.access.token is not None:
                    headers["set-cookie"] = f"{self.cookie}={self.access.token}; Path=/; HttpOnly; SameSite=Strict"
            await send(message)

        refusal = self.access.refusal(Request(scope), self.cookie)
        app = self.app if refusal is None else JSONResponse({"error": refusal[1]}, status_code=refusal[0])
        await app(scope, receive, answer)
