"""What follows a batch's forward pass on a GPU, beside the forward pass of the next batch.

NMS has to ask the GPU how many boxes there are, several times a batch, and in between the GPU waits for the CPU. So the
next batch's pass is launched first, and NMS runs in a stream of its own, which goes before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def one_late(items: Iterable[T]) -> Iterator[T]:
    """The same items, each when the next one is there."""
    waiting: list[T] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


class SideStream:
    """A stream of ``device`` for work on tensors that its usual stream makes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, _stream(device)

    def mark(self) -> torch.cuda.Event:
        """All that has been launched so far."""
        return torch.cuda.current_stream(self._device).record_event()

    @contextmanager
    def after(self, mark: torch.cuda.Event, *tensors: Tensor) -> Iterator[None]:
        """What is launched in this block runs in the stream, once ``mark`` is done; it reads ``tensors``, whose memory
        is kept until then."""
        self._stream.wait_event(mark)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            for tensor in tensors:
                tensor.record_stream(self._stream)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One a device: memory that one stream has given back serves no other."""
    return torch.cuda.Stream(device, priority=-1)  # its kernels are small and waited for
