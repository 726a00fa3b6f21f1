"""A training on one made-up batch held in memory, for the benchmarks that time the step alone."""

from __future__ import annotations

import torch

from benchmarks.train_throughput import model_and_frame
from engine.epoch import Learner
from engine.parts import build_learner
from utils.config import DataConfig, Hyp, TrainConfig
from utils.dataloaders import Batch
from utils.dist import World


def made_up_batch(count: int, imgsz: int, nc: int, boxes: int = 10, seed: int = 0) -> Batch:
    """Noise with ``boxes`` random boxes an image, the same every time for a ``seed``."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, imgsz, imgsz, 3), dtype=torch.uint8, generator=random).permute(0, 3, 1, 2)
    targets = torch.rand(count * boxes, 6, generator=random) * 0.5 + 0.25
    targets[:, 0] = torch.arange(count).repeat_interleave(boxes)
    targets[:, 1] = torch.randint(0, nc, (count * boxes,), generator=random)
    return Batch(images, targets, ["made up"] * count, [])


def made_up_training(cfg: TrainConfig, device: torch.device) -> tuple[Learner, Batch]:
    """The training that ``cfg`` describes, in train mode with its usual hyper-parameters, and a batch for it, in pinned
    memory where the device is a GPU. Of ``cfg.data`` only the classes count."""
    data, hyp, world = DataConfig.load(cfg.data), Hyp(), World()
    model, frame = model_and_frame(cfg, data, hyp, world, device)
    learner = build_learner(model, cfg, hyp, frame, 100, device, world)
    learner.model.train()
    batch = made_up_batch(frame.batch, frame.imgsz, data.nc)
    return learner, batch.pin_memory() if device.type == "cuda" else batch
