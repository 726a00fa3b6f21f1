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
        self._source: nn.Module | None = None
        self._pairs: tuple[list[Tensor], list[Tensor]] = ([], [])  # averages, and the entries of _source they follow

    @property
    def decay(self) -> float:
        """The decay of the newest update."""
        return self.max_decay * (1 - math.exp(-self.updates / self.tau))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards ``model`` (wrapped or not), in one multi-tensor call."""
        self.updates += 1
        averages, current = self._following(unwrap(model))
        values = [value.to(average.dtype) for average, value in zip(averages, current)]
        torch._foreach_lerp_(averages, values, 1 - self.decay)

    def _following(self, source: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """The floating entries of both state dicts. Listed once for a model: that takes as long as the update, and
        training changes them in place."""
        if self._source is not source:
            current = source.state_dict()
            moving = {key: value for key, value in self.model.state_dict().items() if value.is_floating_point()}
            self._source, self._pairs = source, (list(moving.values()), [current[key] for key in moving])
        return self._pairs

    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Continue from a checkpoint: the averaged state dict and its number of updates."""
        self.model.load_state_dict(state)
        self.updates = updates
