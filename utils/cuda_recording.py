"""Recording a CUDA graph in such a way that a recording that fails leaves nothing behind.

torch tidies up only after recordings that end well. After one that does not (something in it waited for the device),
torch 2.11 goes on taking its random numbers for recorded ones, so that every further one raises "Offset increment
outside graph capture encountered unexpectedly"; keeps the recording's stream as the current one; keeps sending
allocations past the pool, and ends the process when the pool, which the recording still counts as its own, is freed.
One thing stays, as nothing in Python reaches it: the allocator of pinned memory takes the recording for unfinished, so
that its pool takes no other ("already recording to mempool_id").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch


@contextmanager
def recording(
    graph: torch.cuda.CUDAGraph, pool: tuple[int, int], stream: torch.cuda.Stream | None = None
) -> Iterator[None]:
    """What is launched inside goes into ``graph``, memory from ``pool``, on ``stream`` or one of torch's; nothing runs.

    Raises RuntimeError (torch's) for what a graph cannot hold, as waiting for the device; random numbers, streams and
    allocations are then as before, and ``pool`` may be freed but not recorded into again.
    """
    try:
        # thread_local: a loader's pinning thread goes on making calls that a recording would not allow itself
        with (
            torch.cuda.stream(torch.cuda.current_stream()),  # a failed recording stays on its stream
            torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
        ):
            yield
    except BaseException:
        if not _ended(graph):
            _tidy_up(pool)
        raise


def _ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether torch came to the end of the recording, whatever was raised in it."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


def _tidy_up(pool: tuple[int, int]) -> None:
    device = torch.cuda.current_device()
    with suppress(RuntimeError):  # it had come that far
        torch._C._cuda_endAllocateToPool(device, pool)  # both as torch.cuda.use_mem_pool ends
    torch._C._cuda_releasePool(device, pool)
    # one that ends well sets the random numbers right, as torch does it nowhere else
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")
