"""The fill rule of tests/reference/README.md and the stored values, for the tests of this folder."""

from __future__ import annotations

import json
import math
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parents[1] / "reference"


@cache
def stored(name: str) -> Any:
    """A JSON file, or an .npz as a dict of arrays."""
    path = FOLDER / name
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with np.load(path) as arrays:
        return {key: arrays[key] for key in arrays.files}


def u(key: str, n: int) -> np.ndarray:
    """n float64 values in [0, 1) from a text key, by integer hashing."""
    x = (zlib.crc32(key.encode()) + np.arange(n, dtype=np.uint64)) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x45D9F3B)) & 0xFFFFFFFF
    return (x ^ (x >> np.uint64(16))) / 2.0**32


def image(shape: list[int] | tuple[int, ...], key: str = "input") -> Tensor:
    return torch.from_numpy(u(key, math.prod(shape)).reshape(shape)).float()


@torch.no_grad()
def fill(module: nn.Module, g: float = 1.5, b: float = 0.6) -> nn.Module:
    """Weights by the fill rule; returns the module in eval mode."""
    for key, tensor in module.state_dict().items():
        if key.endswith("anchors"):
            continue
        if not tensor.dtype.is_floating_point:
            tensor.zero_()
            continue
        r = 2 * u(key, tensor.numel()).reshape(tuple(tensor.shape)) - 1
        if key.endswith("running_var"):
            value = 1 + 0.3 * r
        elif key.endswith("running_mean"):
            value = 0.1 * r
        elif tensor.dim() >= 2:
            value = r * g * math.sqrt(3 / math.prod(tensor.shape[1:]))
        elif key.endswith("weight"):
            value = 1 + 0.2 * r
        else:
            value = b * r
        tensor.copy_(torch.from_numpy(np.asarray(value)))
    return module.eval()
