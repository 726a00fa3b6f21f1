"""Work that a run need not wait for, done by a thread in the order given."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


def now(function: Callable[..., Any], *arguments: Any) -> None:
    """Call it; in the place of a :class:`Background`."""
    function(*arguments)


def held(value: Any) -> Any:
    """Plain data with copies of its tensors, on the CPU: as it is now, whatever becomes of the original."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: held(item) for key, item in value.items()}
    return type(value)(held(item) for item in value) if type(value) in (list, tuple) else value


class Background:
    """Called with a function and its arguments, has it called soon. What one of them raises is raised by :meth:`wait`,
    and those after it are left out."""

    def __init__(self, most: int | None = None) -> None:
        """``most``: so many calls wait at once; one more waits for the first of them."""
        self._most = most
        self._thread = ThreadPoolExecutor(1, "background")
        self._pending: list[Future] = []
        self._error: BaseException | None = None

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> None:
        """``arguments`` are held as they are now."""
        while self._most is not None and len(self._pending) >= self._most:
            self._pending[0].result()
            self._pending.pop(0)
        self._pending.append(self._thread.submit(self._call, function, held(arguments)))

    def _call(self, function: Callable[..., Any], arguments: tuple) -> None:
        if self._error is None:
            try:
                function(*arguments)
            except BaseException as error:  # whatever it is, it belongs to who waits
                self._error = error

    def wait(self) -> None:
        """Until all is done."""
        while self._pending:
            self._pending[0].result()
            self._pending.pop(0)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
