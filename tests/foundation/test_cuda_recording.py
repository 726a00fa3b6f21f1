"""A recording that fails leaves the device as it was. Everything here needs a GPU: nothing else records."""

from __future__ import annotations

import gc

import pytest
import torch

from utils.cuda_recording import recording


def fail(pool: torch.cuda.MemPool) -> None:
    """A recording that waits for the device, which none may."""
    with pytest.raises(RuntimeError), recording(torch.cuda.CUDAGraph(), pool.id):
        torch.ones(4, device="cuda").sum().item()


@pytest.mark.gpu
def test_what_follows_a_failed_recording() -> None:
    """Random numbers, the current stream, graphs recorded before and after, and the pool's end."""
    pool, other = torch.cuda.MemPool(), torch.cuda.MemPool()
    before, after = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with recording(before, pool.id):
        first = torch.rand(8, device="cuda")
    fail(pool)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(8, device="cuda").unique().numel() > 1
    with recording(after, other.id):
        second = torch.rand(8, device="cuda")
    drawn = []
    for graph, values in ((before, first), (after, second), (before, first)):
        graph.replay()
        drawn.append(values.clone())
    assert len({tuple(values.tolist()) for values in drawn}) == 3
    del graph, before, after, first, second, values, pool, other
    gc.collect()  # torch ends the process over a pool that somebody still counts as his
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_memory_of_other_streams_returns_after_a_failed_recording() -> None:
    pool, side = torch.cuda.MemPool(), torch.cuda.Stream()
    fail(pool)
    torch.cuda.empty_cache()
    places = set()
    for _ in range(6):
        values = torch.ones(1 << 22, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            values.add_(1)
        values.record_stream(side)
        places.add(values.data_ptr())
        del values
        torch.cuda.synchronize()
    assert len(places) < 6


@pytest.mark.gpu
def test_what_is_raised_inside_comes_out() -> None:
    """By something else than the recording, which then ends well."""
    pool = torch.cuda.MemPool()
    with pytest.raises(ValueError, match="mine"), recording(torch.cuda.CUDAGraph(), pool.id):
        torch.ones(4, device="cuda")
        raise ValueError("mine")
    assert torch.rand(8, device="cuda").unique().numel() > 1
    gc.collect()
