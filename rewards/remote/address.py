"""Names of scorers that ask a server: http://HOST:PORT/PATH, and openai+http://HOST:PORT/v1#MODEL."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from fdfo.config.errors import UserError

CHAT = "openai+"
FORMS = "http://HOST:PORT/PATH, or openai+http://HOST:PORT/v1#MODEL; https works too"


@dataclass(frozen=True)
class Address:
    """A server, and what speaks with it."""

    url: str
    model: str | None  # of a chat endpoint; None for a server of scores


def parse_address(name: str) -> Address:
    """Take a name apart. Raises UserError if it is none, or holds a password, which names must not: they are logged."""
    url, hash_sign, model = name.removeprefix(CHAT).partition("#")
    chat = name.startswith(CHAT)
    try:
        parts = urlsplit(url)
        complete = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        complete = False
    if complete and ("@" in parts.netloc or parts.query):
        raise UserError(
            f"The server at {parts.hostname} is given with a user or a question mark: names are logged, so leave out whatever is "
            "secret, and give the host, the port and the path alone. A key comes from the environment (OPENAI_API_KEY)."
        )
    if not complete or chat != bool(model) or bool(hash_sign) != chat:
        raise UserError(f"{name!r} names no server: write {FORMS}.")
    return Address(url.rstrip("/") if chat else url, model if chat else None)
