"""AutoBatch (``--batch-size -1``): the largest batch that fits, from the memory that a few small ones need."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from utils.errors import ResourceError

DEFAULT_BATCH = 16
_MOST = 1024
_SIZES = (1, 2, 4, 8, 16)
_GIB = 2**30


@dataclass(frozen=True)
class BatchChoice:
    """A batch size and one line that says where it comes from."""

    batch: int
    text: str


def largest_batch(
    measure: Callable[[int], int],
    free_bytes: int,
    fraction: float = 0.8,
    default: int = DEFAULT_BATCH,
    sizes: Sequence[int] = _SIZES,
) -> BatchChoice:
    """The batch whose training step would fill ``fraction`` of ``free_bytes``.

    measure(batch) runs one step and returns the bytes it needed; it may raise torch.OutOfMemoryError, which ends the
    measuring. Memory is taken to grow linearly with the batch; the answer is at most 1024, and below a size that
    failed. ``default`` is the answer when memory does not grow with the batch. Raises ResourceError when not even
    the smallest size fits.
    """
    used: dict[int, int] = {}
    too_large = None
    for size in sizes:
        try:
            used[size] = measure(size)
        except torch.OutOfMemoryError:
            too_large = size
            break
    if not used:
        raise ResourceError(
            f"--batch-size -1: not even a batch of {sizes[0]} fits into {free_bytes / _GIB:.1f} GiB; "
            f"use a smaller --imgsz or a smaller model"
        )
    measured = list(used)
    if len(measured) == 1:
        return BatchChoice(measured[0], f"AutoBatch: batch size {measured[0]}, the only one that fits")
    slope, intercept = np.polyfit(measured, list(used.values()), 1)
    if not (math.isfinite(slope) and slope > 0):
        batch = default if too_large is None else min(default, measured[-1])
        return BatchChoice(batch, f"AutoBatch: memory measurements make no sense, using batch size {batch}")
    exact = (free_bytes * fraction - intercept) / slope
    batch = min(max(math.floor(exact + 1e-6), measured[0]), _MOST)
    if too_large is not None and batch >= too_large:
        batch = measured[-1]
    share = (slope * batch + intercept) / free_bytes
    need = (slope * batch + intercept) / _GIB
    return BatchChoice(
        batch, f"AutoBatch: batch size {batch} for {need:.2f} of {free_bytes / _GIB:.2f} GiB ({share:.0%})"
    )


def auto_batch(step: Callable[[int], None], device: torch.device, fraction: float = 0.8) -> BatchChoice:
    """:func:`largest_batch` on ``device``. ``step(batch)`` runs forward, loss and backward once with made-up images.

    On other devices than CUDA, whose memory cannot be asked for, the answer is 16. What the steps changed (gradients,
    BN statistics, random state) is the caller's to put back.
    """
    if device.type != "cuda":
        text = f"AutoBatch: needs CUDA memory to measure, using batch size {DEFAULT_BATCH} on {device.type.upper()}"
        return BatchChoice(DEFAULT_BATCH, text)

    def measure(batch: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        step(batch)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_reserved(device) - before

    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)  # counts what other processes hold, unlike torch's own numbers
    try:
        return largest_batch(measure, free, fraction)
    finally:
        torch.cuda.empty_cache()
