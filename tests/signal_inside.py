"""Sends this process a real signal where it enters a given function of the real code."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def signal_inside(function: str, number: signal.Signals, armed: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Inside, the first call of `function` of this project's code for which armed() holds gets the signal, once."""

    def watch(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_name == function and "/fdfo/" in code.co_filename and armed():
            sys.setprofile(None)
            os.kill(os.getpid(), number)

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)
