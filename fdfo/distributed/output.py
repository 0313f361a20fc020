"""Keeps a process alive whose output cannot be written: it then goes nowhere, and the work goes on."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


class Output:
    """A text stream that is replaced by the null device at its first failed write.

    That happens where the reader of a pipe has ended, a disk is full, or a terminal was closed.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self.failing():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self.failing():
            self.stream.flush()

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Point the stream's descriptor at the null device if a write fails inside; what is in its buffer goes there too."""
        try:
            yield
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            self.stream.flush()


@contextlib.contextmanager
def writable_output() -> Iterator[None]:
    """Make both streams of the process ones that can always be written. A stream that is closed at the start is None in Python."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Output(open(os.devnull, "w") if stream is None else stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
