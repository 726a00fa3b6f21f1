"""Diagrams drawn by processes of their own, while the program goes on: matplotlib takes a second to import and a third
of one for each figure. A painter imports neither torch nor anything else of the run."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, suppress
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import Any

from utils import curves
from utils.errors import ResourceError

MOST_PAINTERS = 3


class Painters(AbstractContextManager):
    """``draw`` gives a function of utils.curves to a painter and returns at once; :meth:`close`, or leaving the
    ``with`` block, waits for all of them. A block left by an exception ends them, as the end of the program does.

    Painters start at once, as many as there are cores to spare. What one could not do is raised by ``close``.
    """

    def __init__(self, cores: int | None = None) -> None:
        count = max(1, min(MOST_PAINTERS, (cores or os.cpu_count() or 1) // 4))
        context = SpawnContext()
        context.Process = _Painter
        self._closed = False
        self._pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(os.getcwd(),))
        self._drawn = [self._pool.submit(int) for _ in range(count)]  # nothing to do, but a process starts for each

    def draw(self, name: str, *arguments: Any) -> None:
        """Have ``curves.<name>(*arguments)`` done. The arguments are pickled: plain data, paths and arrays."""
        with suppress(BrokenProcessPool):  # the run goes on: close() tells
            self._drawn.append(self._pool.submit(getattr(curves, name), *arguments))

    def close(self) -> None:
        """Wait until everything is drawn; once. Raises ResourceError when something could not be."""
        if self._closed:
            return
        self._closed = True
        try:
            self._drawn.append(self._pool.submit(int))  # raises if a painter was lost while nothing was to be drawn
            self._pool.shutdown()
            for drawn in self._drawn:
                drawn.result()
        except BrokenProcessPool:
            raise ResourceError("diagrams are missing: a painter was killed (is memory short?)") from None

    def __exit__(self, kind: type | None, *exc: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:  # if the run has failed or Ctrl-C came, nobody waits for pictures
            for process in multiprocessing.active_children():
                if isinstance(process, _Painter):
                    process.kill()
            self._pool.shutdown(cancel_futures=True)


class _Painter(SpawnProcess):
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


def _begin(folder: str) -> None:
    os.setsid()  # a SIGTERM to the whole group is for the program, too
    program = multiprocessing.parent_process()
    threading.Thread(target=lambda: (program.join(), os._exit(1)), daemon=True).start()
    os.chdir(folder)
    warnings.simplefilter("ignore")  # matplotlib's, about letters that its font does not have
    logging.disable(logging.WARNING)
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401 - while the program is still starting
