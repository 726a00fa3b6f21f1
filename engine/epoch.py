"""One epoch of learning: the step, and the loop over batches around it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.console import LOGGER, progress
from utils.device import memory_gb, to_network_input
from utils.dist import World
from utils.ema import ModelEMA
from utils.errors import ResourceError, UserError
from utils.loss import DetectionLoss, LossParts
from utils.schedule import Schedule

HEADER = ("Epoch", "GPU_mem", "box_loss", "obj_loss", "cls_loss", "Instances", "Size", "img/s")


class TrainingDiverged(UserError):
    """The loss is no longer a finite number."""


@dataclass
class Learner:
    """What a training step works on. ``model`` may be wrapped in DDP; ``ema`` lives on rank 0 only."""

    model: nn.Module
    criterion: DetectionLoss
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    ema: ModelEMA | None
    device: torch.device
    world: World
    amp_dtype: torch.dtype | None = None
    clip_grad: float = 10.0
    loss_gain: float = 1.0

    def backward(self, images: Tensor, targets: Tensor) -> LossParts:
        """Forward, loss and backward of one batch; gradients add up until :meth:`step`.

        images (B, 3, H, W) float in 0..1 on the device, targets (T, 6) on the device. DDP averages gradients over
        ranks, while hyper-parameters are tuned for the sum over images: hence the factor world.size.
        """
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            raw = self.model(images)
        parts = self.criterion(raw, targets)
        self.scaler.scale(parts.total * (self.world.size * self.loss_gain)).backward()
        return parts

    def step(self) -> Tensor:
        """Unscale, clip, step, clear the gradients, update the EMA. Returns the gradient norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)
        return norm


@dataclass(frozen=True)
class EpochResult:
    """Mean losses (box, obj, cls), learning rates by role at the last step, images per second over all ranks."""

    losses: Tensor
    lr: dict[str, float]
    images_per_second: float


def resize_batch(images: Tensor, rng: np.random.Generator, imgsz: int, stride: int) -> Tensor:
    """Multi-scale training: the batch resized so that its longer side is a random multiple of ``stride`` within
    0.5 to 1.5 times ``imgsz``; sides are rounded up to the stride, bilinear."""
    size = int(rng.integers(int(imgsz * 0.5), int(imgsz * 1.5) + stride)) // stride * stride
    factor = size / max(images.shape[2:])
    if factor == 1:
        return images
    shape = [math.ceil(side * factor / stride) * stride for side in images.shape[2:]]
    return F.interpolate(images, size=shape, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class MultiScale:
    """Settings of multi-scale training: the nominal size, the stride, and the seed of the sizes drawn."""

    imgsz: int
    stride: int
    seed: int


def train_one_epoch(
    learner: Learner, loader: Iterable, epoch: int, epochs: int, multi_scale: MultiScale | None = None
) -> EpochResult:
    """Run all batches of one epoch. ``loader`` yields utils.dataloaders.Batch and has a length.

    Raises TrainingDiverged when the loss stops being finite, ResourceError when memory runs out. Gradients left
    over at the end (fewer batches than the accumulation asks for) are dropped, as users' schedules assume.
    """
    learner.model.train()
    learner.optimizer.zero_grad(set_to_none=True)
    rng = np.random.default_rng((multi_scale.seed, epoch)) if multi_scale else None
    meter = _Meter(learner, epoch, epochs, len(loader))
    bar = progress(loader, total=len(loader), enabled=learner.world.main)
    count = size = 0
    try:
        for index, batch in enumerate(bar):
            settings = learner.schedule.at(epoch, index)
            learner.schedule.apply(learner.optimizer, settings)
            images = to_network_input(batch.images, learner.device)
            if multi_scale:
                images = resize_batch(images, rng, multi_scale.imgsz, multi_scale.stride)
            count, size = images.shape[0], images.shape[-1]
            parts = learner.backward(images, batch.targets.to(learner.device, non_blocking=True))
            if settings.optimizer_step:
                learner.step()
            text = meter.add(parts, batch, size)
            if text:
                bar.set_description(text, refresh=False)
    except torch.OutOfMemoryError:
        raise _out_of_memory(learner, count, size) from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise _out_of_memory(learner, count, size) from None
    finally:
        bar.close()
    return EpochResult(meter.finish(), settings.lr, meter.images_per_second)


class _Meter:
    """Running mean of the losses, kept on the device and read once in a while: reading stalls a GPU's queue."""

    def __init__(self, learner: Learner, epoch: int, epochs: int, batches: int) -> None:
        self.learner, self.epoch, self.epochs, self.batches = learner, epoch, epochs, batches
        self.read_every = 1 if learner.device.type == "cpu" else 20
        self.total = torch.zeros(3, device=learner.device)
        self.finite = torch.ones((), dtype=torch.bool, device=learner.device)
        self.count = self.images = 0
        self.recent: list[str] = []
        self.start = time.perf_counter()

    @property
    def images_per_second(self) -> float:
        return self.images * self.learner.world.size / max(time.perf_counter() - self.start, 1e-9)

    def add(self, parts: LossParts, batch, size: int) -> str:
        """Count one batch; returns the bar's text when the losses were read."""
        self.total += parts.items.float()
        self.finite &= torch.isfinite(parts.total.detach()).all()
        self.count += 1
        self.images += batch.images.shape[0]
        self.recent = (self.recent + list(batch.paths))[-8:]
        if self.count % self.read_every and self.count != self.batches:
            return ""
        self._check(parts)
        box, obj, cls = (self.total / self.count).tolist()
        memory = f"{memory_gb(self.learner.device):.3g}G"
        values = (f"{self.epoch}/{self.epochs - 1}", memory, box, obj, cls, len(batch.targets), size)
        return ("%11s" * 2 + "%11.4g" * 3 + "%11i" * 2 + "%11.0f") % (*values, self.images_per_second)

    def _check(self, parts: LossParts) -> None:
        if bool(self.finite):
            return
        lr = {g["role"]: g["lr"] for g in self.learner.optimizer.param_groups}
        raise TrainingDiverged(
            f"the loss is not finite at epoch {self.epoch}, batch {self.count} of {self.batches} "
            f"(box {parts.box.item():.3g}, obj {parts.obj.item():.3g}, cls {parts.cls.item():.3g}, lr {lr}); "
            f"the checkpoints of earlier epochs are whole: start from weights/last.pt with a lower lr0 in --hyp, "
            f"or with --amp off. Last images: {', '.join(self.recent[-3:])}"
        )

    def finish(self) -> Tensor:
        return (self.total / max(self.count, 1)).cpu()


def _out_of_memory(learner: Learner, batch: int, size: int) -> ResourceError:
    where = "GPU" if learner.device.type == "cuda" else learner.device.type.upper()
    smaller = max(batch // 2, 1) * learner.world.size
    return ResourceError(
        f"{where} memory ran out at batch {batch * learner.world.size}, {size} px; use --batch-size {smaller} "
        f"(gradients are added up to the nominal 64 all the same), --batch-size -1, or a smaller --imgsz"
    )


def log_header() -> None:
    """The column names above an epoch's bar."""
    LOGGER.info("\n" + ("%11s" * len(HEADER)) % HEADER)
