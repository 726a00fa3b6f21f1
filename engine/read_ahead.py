"""Frames read by a thread of their own while the model is at work, and put together to batches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from queue import Empty, Full, Queue
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 0.1
"""Seconds between two looks at whether the other side is still there."""


def read_ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The items in their order, up to ``count`` of them taken in advance, by a thread. What taking one raises is raised
    here, after those before it. Leaving the loop early ends the thread, at the latest when it has its next item."""
    waiting: Queue[tuple[bool, T | BaseException | None]] = Queue(count)
    left = threading.Event()

    def put(entry: tuple[bool, T | BaseException | None]) -> None:
        while not left.is_set():
            try:
                return waiting.put(entry, timeout=PATIENCE)
            except Full:
                continue

    def take_all() -> None:
        try:
            for item in items:
                put((True, item))
                if left.is_set():
                    return
            put((False, None))
        except BaseException as error:  # whatever it is, it belongs to the reader
            put((False, error))

    threading.Thread(target=take_all, name="read ahead", daemon=True).start()
    try:
        while True:
            try:
                more, item = waiting.get(timeout=PATIENCE)  # without one, Ctrl-C would wait too on some systems
            except Empty:
                continue
            if not more:
                if item is not None:
                    raise item
                return
            yield item
    finally:
        left.set()


def in_batches(items: Iterable[T], size: int, kind: Callable[[T], Hashable]) -> Iterator[list[T]]:
    """Runs of up to ``size`` items of the same ``kind``, in their order."""
    batch: list[T] = []
    for item in items:
        if batch and kind(item) != kind(batch[0]):
            yield batch
            batch = []
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
