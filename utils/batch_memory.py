"""Shared memory for batches that loader processes write into again and again.

Fresh shared memory costs the system more than an augmented image costs OpenCV: it is handed out, and zeroed, page by
page. So each loader process keeps a few blocks, and the main process tells it, by a byte in shared memory, when a
batch has been copied out of one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

BLOCKS = 3
"""Blocks of each loader process: torch asks it for two batches ahead, and a third may be on its way out."""


class Ticket(NamedTuple):
    """A block in use: the loader process and its block."""

    worker: int
    block: int


class Draws(list):
    """What a loader process is asked for, with the number of the stream it belongs to. When a stream begins, what was
    left of those before it is never used."""

    stream = 0


class BatchMemory:
    """The blocks of all loader processes: each process has its own, the bytes that tell which are free are shared."""

    def __init__(self, workers: int) -> None:
        self.free = torch.ones(workers, BLOCKS, dtype=torch.uint8).share_memory_()
        self._blocks: dict[int, Tensor] = {}
        self._streams: dict[int, int] = {}

    def take(self, shape: tuple[int, ...], worker: int, stream: int) -> tuple[Tensor, Ticket | None]:
        """uint8 memory of this shape, its content of any kind, and the ticket to give back; None for memory that is new
        because all blocks are in use."""
        size = math.prod(shape)
        for block in range(BLOCKS):
            if self.free[worker, block] or self._streams.get(block, -1) < stream:
                if block not in self._blocks or self._blocks[block].numel() < size:
                    self._blocks[block] = shared_bytes((size,))
                self.free[worker, block], self._streams[block] = 0, stream
                return self._blocks[block][:size].view(shape), Ticket(worker, block)
        return shared_bytes(shape), None

    def give_back(self, ticket: Ticket | None) -> None:
        """Nobody needs what is in the block any more (called in any process)."""
        if ticket is not None:
            self.free[ticket] = 1


def shared_bytes(shape: tuple[int, ...]) -> Tensor:
    """Uninitialised uint8 memory; in a loader process in memory shared with the main one, so that it is not copied
    again on the way."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    # as torch's own default_collate does: the public share_memory_() would copy what is not there yet
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)
