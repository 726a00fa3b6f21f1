"""One contract for all exported files: a :class:`Runtime` is called like a model in eval mode."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

from deploy.metadata import Metadata
from utils.errors import ConfigError, ExportError

MAX_VALUES = 50_000_000
"""Of the predictions that an image's detections are turned back into."""


class Runtime(nn.Module):
    """An exported file, ready to run. Has no parameters; ``.to()``, ``.half()`` and ``.eval()`` change nothing.

    ``names``, ``nc``, ``stride`` (levels,) and ``yaml`` are those of a model; ``imgsz`` is (height, width) and
    ``at_once`` the number of images where the file takes no others, else None. ``suppresses``: it gives only what is
    left after suppression.
    """

    half_input = True
    """Whether a file in float16 takes float16 images; converters that make float16 themselves leave the input alone."""

    def __init__(self, meta: Metadata, source: Path) -> None:
        super().__init__()
        self.meta, self.source = meta, source
        self.names, self.nc = dict(enumerate(meta.names)), len(meta.names)
        self.stride = torch.tensor(meta.strides)
        self.imgsz = None if meta.dynamic else meta.imgsz
        self.at_once = None if meta.dynamic else meta.batch
        self.suppresses = self.meta.nms > 0
        self.yaml: dict = {}

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """images (B, 3, H, W) in 0..1 -> (decoded (B, N, 5 + nc) float32 on the device of images, None).

        Any B: a file made for one batch size is run as often as it takes, the last time filled up. Raises ConfigError
        for a size that the file does not take, ExportError for a file that gives something else than it says.
        """
        size = tuple(images.shape[2:])
        if self.imgsz is not None and size != self.imgsz:
            height, width = self.imgsz
            raise ConfigError(f"{self.source}: takes images of {height}x{width}, not {size[0]}x{size[1]}; export it "
                              "with --dynamic for any size")  # fmt: skip
        device = images.device
        images = images.to(torch.float16 if self.meta.half and self.half_input else torch.float32)
        if self.meta.dynamic:
            return self._decoded(images).to(device), None
        parts = [self._filled(chunk) for chunk in images.split(self.meta.batch)]
        return torch.cat(parts).to(device), None

    def _filled(self, images: Tensor) -> Tensor:
        """Up to ``meta.batch`` images through a file that takes that many."""
        missing = self.meta.batch - len(images)
        full = torch.cat((images, images.new_zeros(missing, *images.shape[1:]))) if missing else images
        return self._decoded(full)[: len(images)]

    def _decoded(self, images: Tensor) -> Tensor:
        output, batch = self.run(images), len(images)
        if self.meta.nms:
            self._expect(output, output.dim() == 2 and output.shape[1] == 7, f"(n, 7) for {self.nc} classes")
            self._expect(output, bool(((output[:, 6] >= 0) & (output[:, 6] < self.nc)).all()), f"{self.nc} classes")
            return from_detections(output, batch, self.nc, min(self.nc * self.meta.nms, MAX_VALUES // (5 + self.nc)))
        right = output.dim() == 3 and (output.shape[0], output.shape[2]) == (batch, 5 + self.nc)
        self._expect(output, right, f"({batch}, N, {5 + self.nc}) for {self.nc} classes")
        return output

    def _expect(self, output: Tensor, right: bool, expected: str) -> None:
        """Files may come from anywhere: what they say of themselves need not be what they give."""
        if not right:
            raise ExportError(f"{self.source}: gives {tuple(output.shape)}, expected {expected}; export it again")

    @abstractmethod
    def run(self, images: Tensor) -> Tensor:
        """What comes out of the file: (B, N, 5 + nc) float32, with ``meta.nms`` (n, 7)."""


def from_detections(rows: Tensor, batch: int, nc: int, most: int) -> Tensor:
    """(n, 7) image, x1, y1, x2, y2, confidence, class -> (B, ``most``, 5 + nc), zeros behind an image's last.

    So that files with suppression inside go the way of all others; a second suppression changes nothing.
    """
    image, cls = rows[:, 0].long(), rows[:, 6].long()
    decoded = torch.zeros(len(rows), 5 + nc)
    decoded[:, 0:2], decoded[:, 2:4] = (rows[:, 1:3] + rows[:, 3:5]) / 2, rows[:, 3:5] - rows[:, 1:3]
    decoded[:, 4] = rows[:, 5]
    decoded[torch.arange(len(rows)), 5 + cls] = 1.0
    each = [decoded[image == number] for number in range(batch)]
    return torch.stack([nn.functional.pad(own, (0, 0, 0, most - len(own))) for own in each])
