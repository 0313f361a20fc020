"""Opens a port for a server of the project."""

import socket

from fdfo.config.errors import UserError


def open_port(what: str, host: str, port: int, flags: str) -> socket.socket:
    """Return a socket that listens on a port, 0 for any free one. Raises UserError, naming what is served and the flags, if it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"{what} cannot be served on {host} port {port} ({error.strerror}): give another {flags}.") from error
