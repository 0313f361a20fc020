"""Sends this process a real signal while its main thread is inside a given function of the real code."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable


def send_inside(function: str, number: signal.Signals, armed: Callable[[], bool]) -> threading.Thread:
    """Starts a thread that waits until armed() and then until the main thread is inside `function`, and sends the signal once."""
    main = threading.main_thread().ident

    def watch() -> None:
        while not armed():
            time.sleep(0.01)
        while function not in names(sys._current_frames()[main]):
            time.sleep(0.0002)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def names(frame) -> set[str]:
    """The functions that a stack is inside."""
    found = set()
    while frame is not None:
        found.add(frame.f_code.co_name)
        frame = frame.f_back
    return found
