"""Work that a run need not wait for, done by a thread in the order given."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


def now(function: Callable[..., Any], *arguments: Any) -> None:
    """Call it; in the place of a :class:`Background`."""
    function(*arguments)


AT_ONCE = 1 << 23
"""Values that travel from a GPU together, at least one tensor."""


def held(value: Any) -> Any:
    """Plain data with copies of its tensors, on the CPU: as it is now, whatever becomes of the original."""
    tensors: list[Tensor] = []
    _with_tensors(value, tensors.append)
    fetched = iter(fetch([tensor for tensor in tensors if tensor.device.type != "cpu"]))
    return _with_tensors(value, lambda t: t.detach().clone() if t.device.type == "cpu" else next(fetched))


def _with_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same with what ``function`` makes of each tensor, in their order."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _with_tensors(item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_tensors(item, function) for item in value)
    return value


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous copies on the CPU, joined on their device for the way: a training state has a thousand, and each
    transfer waits. They share memory with one another."""
    copies: dict[int, Tensor] = {}
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        groups[tensor.device, tensor.dtype].append(index)
    for group in groups.values():
        while group:
            part = [group.pop(0)]
            room = AT_ONCE - tensors[part[0]].numel()
            while group and tensors[group[0]].numel() <= room:
                room -= tensors[group[0]].numel()
                part.append(group.pop(0))
            copies |= zip(part, _joined([tensors[index].detach() for index in part]))
    return [copies[index] for index in range(len(tensors))]


def _joined(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies on the CPU of tensors of one device and type, by one transfer if there is memory for it."""
    try:
        joined = torch.cat([tensor.reshape(-1) for tensor in tensors])
        # pinned: a transfer as fast as the bus, into memory that torch keeps for the next time
        here = torch.empty_like(joined, device="cpu", pin_memory=joined.is_cuda).copy_(joined)
    except RuntimeError:  # no memory left to join them in, or to pin
        return [tensor.to("cpu", copy=True) for tensor in tensors]
    pieces = here.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors)]


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

    def check(self) -> None:
        """Raise what one of them has raised by now."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Until all is done."""
        while self._pending:
            self._pending[0].result()
            self._pending.pop(0)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
