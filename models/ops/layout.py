"""Maps laid out channels last, the order in which the fused kernels read and write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def empty_map(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised (B, C, H, W) map laid out channels last."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
