"""Processes that draw diagrams and count while the program goes on: matplotlib takes a second to import and a fifth of
one for each figure, COCO's evaluation some milliseconds an image. A helper imports no torch, which would take longer.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, suppress
from functools import partial
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import Any

from utils import curves
from utils.cores import available_cores
from utils.errors import ResourceError
from utils.signals import interrupts_deferred

MOST_HELPERS = 4


def helper_count(cores: int | None = None) -> int:
    """How many helpers there are cores for, at least one."""
    return max(1, min(MOST_HELPERS, (cores or available_cores()) // 4))


class Helpers(AbstractContextManager):
    """``draw`` gives a function of utils.curves to a helper and returns at once, ``begin`` any whose result is asked
    for later; :meth:`close`, or leaving the ``with`` block, waits until all is done. A block left by an exception ends
    them, as the end of the program does.

    Helpers start at once, ``count`` of them: :func:`helper_count`. What one could not draw is raised by
    ``close``.
    """

    def __init__(
        self, cores: int | None = None, prepare: Sequence[Callable[[], None]] = (curves.prepare_drawing,)
    ) -> None:
        """``prepare``: functions that they call first, while the program goes on."""
        self.count = helper_count(cores)
        context = SpawnContext()
        self._processes: list[_Helper] = []
        context.Process = self._process
        self._closed = False
        self._given: list[Future] = []
        self._drawn: list[Future] = []
        self._lost = False
        self._pool: ProcessPoolExecutor | None = None
        try:
            with interrupts_deferred():  # half a pool could not be ended
                self._pool = ProcessPoolExecutor(
                    self.count, context, initializer=_begin, initargs=(os.getcwd(), prepare)
                )
                for _ in range(self.count):
                    self._submit(int)  # nothing to do, but a process starts for each
        except KeyboardInterrupt:
            self._end()
            raise

    def _process(self, *arguments: Any, **keywords: Any) -> _Helper:
        self._processes.append(_Helper(*arguments, **keywords))
        return self._processes[-1]

    def draw(self, name: str, *arguments: Any) -> None:
        """Have ``curves.<name>(*arguments)`` done. The arguments are pickled: plain data, paths and arrays."""
        try:
            self._drawn.append(self._submit(getattr(curves, name), *arguments))
        except BrokenProcessPool:
            self._lost = True  # the run goes on: close() tells

    def begin(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """Have a function called; returns what waits for its result, or for what it raises. Function, arguments and
        result are pickled. When a helper is lost, the one who asks for the result calls the function."""
        here = partial(function, *arguments)
        try:
            future = self._submit(function, *arguments)
        except BrokenProcessPool:
            return here

        def result() -> Any:
            try:
                return future.result()
            except BrokenProcessPool:
                return here()

        return result

    def close(self) -> None:
        """Wait until everything is done; once. Raises ResourceError when something could not be drawn."""
        if self._closed:
            return
        self._closed = True
        wait(self._given)
        self._shut_down()
        try:
            for future in self._drawn:
                future.result()
        except BrokenProcessPool:
            self._lost = True
        if self._lost:
            raise ResourceError("diagrams are missing: a process that draws them was killed (is memory short?)")

    def __exit__(self, kind: type | None, *exc: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:  # if the run has failed or Ctrl-C came, nobody waits for pictures
            self._end()

    def _end(self) -> None:
        for process in self._processes:
            if process.pid:  # it was started
                process.kill()
        self._shut_down()

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        self._given.append(self._pool.submit(function, *arguments))
        return self._given[-1]

    def _shut_down(self) -> None:
        """Leave the pool, in which nobody works any more. Ctrl-C waits: where it interrupts the waiting for a thread,
        Python before 3.13 takes the thread for ended and closes what that still uses."""
        with interrupts_deferred():
            if self._pool:
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


def _begin(folder: str, prepare: Sequence[Callable[[], None]]) -> None:
    atexit.register(os._exit, 0)  # results are handed over by then, and taking Python apart takes a tenth of a second
    os.setsid()  # a SIGTERM to the whole group is for the program, too
    program = multiprocessing.parent_process()
    threading.Thread(target=lambda: (program.join(), os._exit(1)), daemon=True).start()
    os.chdir(folder)
    warnings.simplefilter("ignore")  # matplotlib's, about letters that its font does not have
    logging.disable(logging.WARNING)
    for function in prepare:
        with suppress(ImportError):  # what needs it will tell
            function()
