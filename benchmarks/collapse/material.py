"""The batches that all arms are trained on: real, augmented as in training, made once and held on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.config import DataConfig, Hyp
from utils.dataloaders import create_dataloader
from utils.dataset import DetectionDataset


@dataclass(frozen=True)
class Material:
    """``images``: uint8 (B, 3, H, W) each; ``targets``: float32 (T, 6) each, image, class, cx, cy, w, h in 0..1.
    ``per_epoch``: batches in an epoch of the data set, which the schedule counts by."""

    images: list[Tensor]
    targets: list[Tensor]
    per_epoch: int
    nc: int

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step; after the last the first comes again."""
        return self.images[step % len(self)], self.targets[step % len(self)]


def prepare(
    data: DataConfig, imgsz: int, batch: int, count: int, seed: int, workers: int, device: torch.device
) -> Material:
    """``count`` full batches by train.py's loader with its default hyper-parameters (mosaic, scale, colours, flips),
    epoch after epoch; what is left of an epoch after its last full batch is passed over."""
    settings = dict(hyp=Hyp(), augment=True, nc=data.nc, names=data.names, batch_size=batch, seed=seed, show=False)
    dataset = DetectionDataset(data.train, imgsz, **settings)
    batch = min(batch, len(dataset))
    loader = create_dataloader(dataset, batch, shuffle=True, workers=workers, seed=seed)
    images, targets, epoch = [], [], 0
    while len(images) < count:
        loader.set_epoch(epoch)
        for made in loader:
            if len(made.images) == batch and len(images) < count:
                images.append(made.images.to(device))
                targets.append(made.targets.to(device))
        epoch += 1
    return Material(images, targets, len(loader), data.nc)
