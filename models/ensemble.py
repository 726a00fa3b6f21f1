"""Several models as one: their boxes side by side, for one NMS."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.yolo import DetectionModel
from utils.errors import CheckpointError


class Ensemble(nn.Module):
    """Eval-mode DetectionModels with the same classes. ``names``, ``nc`` and ``yaml`` are the first model's, ``stride``
    that of the model with the largest one."""

    def __init__(self, models: Sequence[DetectionModel]) -> None:
        super().__init__()
        counts = [model.nc for model in models]
        if len(set(counts)) != 1:
            raise CheckpointError(f"an ensemble needs models with the same classes, these have {counts}")
        self.models = nn.ModuleList(models)
        self.nc, self.names, self.yaml = models[0].nc, models[0].names, models[0].yaml

    @property
    def stride(self) -> Tensor:
        """(nl,) float32, pixels."""
        return max((model.stride for model in self.models), key=lambda stride: float(stride.max()))

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """images (B, C, H, W) -> (decoded (B, N1 + N2 + ..., 5 + nc), None)."""
        return torch.cat([model(images)[0] for model in self.models], 1), None
