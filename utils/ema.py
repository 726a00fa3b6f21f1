"""The moving average of a model's weights: what is validated, saved and used in the end."""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


class ModelEMA:
    """Exponential moving average of every floating entry of a model's state dict, BN statistics included.

    ``model``: the averaged copy (eval mode, float32, no gradients). ``updates``: how often it was updated; the decay
    ramps up with it, ``decay * (1 - exp(-updates / tau))``, so that early averages forget the initial weights.
    Integer entries (num_batches_tracked) stay as they were copied.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, tau: float = 2000, updates: int = 0) -> None:
        self.model = deepcopy(unwrap(model)).eval().float().requires_grad_(False)
        self.max_decay, self.tau, self.updates = decay, tau, updates

    @property
    def decay(self) -> float:
        """The decay of the newest update."""
        return self.max_decay * (1 - math.exp(-self.updates / self.tau))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards ``model`` (wrapped or not), in one multi-tensor call."""
        self.updates += 1
        current = unwrap(model).state_dict()
        averages: list[Tensor] = []
        values: list[Tensor] = []
        for key, average in self.model.state_dict().items():
            if average.is_floating_point():
                averages.append(average)
                values.append(current[key].to(average.dtype))
        torch._foreach_lerp_(averages, values, 1 - self.decay)

    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Continue from a checkpoint: the averaged state dict and its number of updates."""
        self.model.load_state_dict(state)
        self.updates = updates
