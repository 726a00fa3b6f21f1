"""Ctrl-C, SIGTERM and SIGHUP: all end a script in the same way, none while processes are being started, and a training
may first bring itself to a point that can be saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

WORKER_GRACE = 30
"""Seconds that a loader process stays after a SIGTERM that its whole group received, for the batch it is asked for."""


class Termination:
    """Whether SIGTERM or SIGHUP came, and which: ``number`` is 0 before."""

    number = 0

    def is_set(self) -> bool:
        return bool(self.number)


class NotedTermination(Termination):
    """See :func:`termination_noted`. ``at_once``: while True the signal ends the block where it stands."""

    at_once = False

    def __init__(self, before: dict[int, Any]) -> None:
        self._before = before

    def end(self) -> None:
        """Do now what the noted signal asks for: raise KeyboardInterrupt."""
        before = self._before.get(self.number)
        if callable(before):
            before(self.number, None)
        raise KeyboardInterrupt


def _terminators() -> list[int]:
    """SIGTERM, and SIGHUP (the terminal closed) unless nohup turned it off."""
    numbers = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


@contextmanager
def sigterm_as_interrupt() -> Iterator[Termination]:
    """Let SIGTERM (``docker stop``, a scheduler) and SIGHUP raise KeyboardInterrupt; what is yielded tells which came.

    Processes forked inside end at once instead. Outside the main thread, where Python sets no handlers, nothing
    changes.
    """
    came = Termination()

    def handler(number: int) -> None:
        came.number = number
        # torch's handler raises, wherever we are, for loader processes that the same SIGTERM has ended
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise KeyboardInterrupt

    with _handled(handler):
        yield came


@contextmanager
def termination_noted(enabled: bool = True) -> Iterator[NotedTermination]:
    """Inside, the first SIGTERM or SIGHUP is only noted, for the block to look at, save and call ``end()``. A second
    one raises KeyboardInterrupt at once. ``enabled`` False: nothing changes."""
    before: dict[int, Any] = {}
    noted = NotedTermination(before)

    def handler(number: int) -> None:
        first = not noted.number
        noted.number = number
        if noted.at_once or not first:
            noted.end()

    if not enabled:
        yield noted
        return
    with _handled(handler) as replaced:
        before.update(replaced)
        yield noted


@contextmanager
def _handled(handler: Callable[[int], None], *also: int) -> Iterator[dict[int, Any]]:
    """``handler`` for the signals that end a program and ``also`` these; yields what it replaces. Processes forked
    inside end at once instead, and do not hear Ctrl-C if that is among them. Outside the main thread, where Python sets
    no handlers, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield {}
        return
    owner = os.getpid()

    def in_owner(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            handler(number)
        elif number != signal.SIGINT:
            os._exit(128 + number)

    before = {number: signal.signal(number, in_owner) for number in (*also, *_terminators())}
    try:
        yield before
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def outlive_first_sigterm() -> None:
    """In a loader process: a scheduler's SIGTERM goes to all processes, and the training still needs its batches to
    reach a point that it can save. The second one, or WORKER_GRACE seconds, end the process."""

    def handler(number: int, frame: FrameType | None) -> None:
        for ends in (number, signal.SIGALRM):
            signal.signal(ends, signal.SIG_DFL)
        signal.alarm(WORKER_GRACE)

    if hasattr(signal, "alarm"):
        for number in _terminators():
            signal.signal(number, handler)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Hold Ctrl-C, SIGTERM and SIGHUP back until the end of the block, in which processes are forked; these end with
    SIGTERM and SIGHUP and will not hear Ctrl-C at all.

    In the middle of a fork KeyboardInterrupt is lost (Python ignores exceptions of its at-fork hooks) or kills a
    process with a traceback; afterwards the parent ends its processes itself.
    """
    came: list[int] = []
    try:
        with _handled(came.append, signal.SIGINT):
            yield
    finally:
        for number in came:
            signal.raise_signal(number)
