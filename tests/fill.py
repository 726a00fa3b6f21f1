"""Deterministic pseudo-random values from a string key, in exact integer arithmetic (tests/reference/README.md)."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor, nn


def u(key: str, n: int) -> np.ndarray:
    """(n,) float64 in [0, 1)."""
    x = (zlib.crc32(key.encode()) + np.arange(n, dtype=np.uint64)) % 2**32
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) % 2**32
    return (x ^ (x >> 16)).astype(np.float64) / 2**32


def uniform(key: str, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
    """float32 tensor of ``shape`` with values of :func:`u` stretched to low..high."""
    values = low + (high - low) * u(key, math.prod(shape))
    return torch.from_numpy(values).float().reshape(shape)


def fill(module: nn.Module, g: float = 1.5, b: float = 0.6) -> nn.Module:
    """Set every entry of the state dict by its key; weights get gain ``g``, biases ``b``; anchors stay. In place."""
    for key, tensor in module.state_dict().items():
        if key.endswith("anchors"):
            continue
        if not tensor.is_floating_point():
            tensor.zero_()
            continue
        r = 2 * u(key, tensor.numel()) - 1
        if key.endswith("running_var"):
            values = 1 + 0.3 * r
        elif key.endswith("running_mean"):
            values = 0.1 * r
        elif tensor.ndim >= 2:
            values = r * g * math.sqrt(3 / math.prod(tensor.shape[1:]))
        elif key.endswith("weight"):
            values = 1 + 0.2 * r
        else:
            values = b * r
        tensor.copy_(torch.from_numpy(values).reshape(tensor.shape))
    return module
