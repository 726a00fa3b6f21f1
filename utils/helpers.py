"""Processes that draw diagrams and count while the program goes on: matplotlib takes a second to import and a third of
one for each figure, COCO's evaluation some milliseconds an image. A helper imports neither torch nor anything else of
the run."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, suppress
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import Any

from utils import curves
from utils.errors import ResourceError

MOST_HELPERS = 4


def spare(cores: int | None = None) -> int:
    """How many helpers there are cores for, at least one."""
    return max(1, min(MOST_HELPERS, (cores or os.cpu_count() or 1) // 4))


class Helpers(AbstractContextManager):
    """``draw`` gives a function of utils.curves to a helper and returns at once, ``begin`` any whose result is asked
    for later; :meth:`close`, or leaving the ``with`` block, waits until all is done. A block left by an exception ends
    them, as the end of the program does.

    Helpers start at once, ``count`` of them: :func:`spare`. What one could not draw is raised by ``close``.
    """

    def __init__(
        self, cores: int | None = None, prepare: Sequence[Callable[[], None]] = (curves.prepare_drawing,)
    ) -> None:
        """``prepare``: functions that they call while the program is still starting."""
        self.count = spare(cores)
        context = SpawnContext()
        context.Process = _Helper
        self._closed = False
        self._pool = ProcessPoolExecutor(self.count, context, initializer=_begin, initargs=(os.getcwd(), prepare))
        self._done = [self._pool.submit(int) for _ in range(self.count)]  # nothing, but a process starts for each

    def draw(self, name: str, *arguments: Any) -> None:
        """Have ``curves.<name>(*arguments)`` done. The arguments are pickled: plain data, paths and arrays."""
        with suppress(BrokenProcessPool):  # the run goes on: close() tells
            self._done.append(self._pool.submit(getattr(curves, name), *arguments))

    def begin(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """Have a function called; returns what waits for its result. Function, arguments and result are pickled.
        Raises what the function raises, and ResourceError when a helper was lost."""

        def result() -> Any:
            try:
                return future.result()
            except BrokenProcessPool:
                raise _lost() from None

        try:
            future = self._pool.submit(function, *arguments)
        except BrokenProcessPool:
            raise _lost() from None
        return result

    def close(self) -> None:
        """Wait until everything is done; once. Raises ResourceError when something could not be."""
        if self._closed:
            return
        self._closed = True
        try:
            self._done.append(self._pool.submit(int))  # raises if a helper was lost while nothing was to be done
            self._pool.shutdown()
            for future in self._done:
                future.result()
        except BrokenProcessPool:
            raise _lost() from None

    def __exit__(self, kind: type | None, *exc: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:  # if the run has failed or Ctrl-C came, nobody waits for pictures
            for process in multiprocessing.active_children():
                if isinstance(process, _Helper):
                    process.kill()
            self._pool.shutdown(cancel_futures=True)


class _Helper(SpawnProcess):
    def start(self) -> None:
        """With a ``__main__`` that is empty: a child would run the program's file again, which may import torch or,
        without a guard, train. And without Ctrl-C, which is for the program."""
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a child inherits it
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _lost() -> ResourceError:
    return ResourceError("diagrams or COCO's numbers are missing: a process that makes them was killed (memory short?)")


def _begin(folder: str, prepare: Sequence[Callable[[], None]]) -> None:
    os.setsid()  # a SIGTERM to the whole group is for the program, too
    program = multiprocessing.parent_process()
    threading.Thread(target=lambda: (program.join(), os._exit(1)), daemon=True).start()
    os.chdir(folder)
    warnings.simplefilter("ignore")  # matplotlib's, about letters that its font does not have
    logging.disable(logging.WARNING)
    for function in prepare:
        function()
