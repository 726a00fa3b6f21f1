"""Ctrl-C and SIGTERM: SIGTERM ends a script as Ctrl-C does, and neither strikes while processes are being started."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_as_interrupt() -> Iterator[threading.Event]:
    """Let SIGTERM (``docker stop``, a scheduler) raise KeyboardInterrupt; the event yielded tells that it came.

    Processes forked inside end at once instead. Outside the main thread, where Python sets no handlers, nothing
    changes.
    """
    came, owner = threading.Event(), os.getpid()

    def handler(number: int, frame: object) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)
        came.set()
        # torch's handler raises, wherever we are, for loader processes that the same SIGTERM has ended
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block, in which processes are forked; they will not hear it at all.

    In the middle of a fork KeyboardInterrupt is lost (Python ignores exceptions of its at-fork hooks) or kills a
    process with a traceback; afterwards the parent ends its processes itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
