"""The one rule for arithmetic that half precision cannot carry."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or unchanged when it is float32 or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
