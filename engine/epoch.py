"""One epoch of learning: the step, and the loop over batches around it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.compiling import CompiledStep
from engine.diagnosis import MEMORY_SIGNS, diverged, out_of_memory
from engine.graphs import StepGraphs
from utils.console import LOGGER, progress
from utils.dcn_watch import DcnWatch
from utils.device import memory_gb, to_network_input
from utils.dist import World, gather
from utils.ema import ModelEMA
from utils.loss import DetectionLoss, LossParts
from utils.optim import clip_gradients, step_if_finite
from utils.schedule import Schedule
from utils.shared_gradients import SharedGradients

HEADER = ("Epoch", "GPU_mem", "box_loss", "obj_loss", "cls_loss", "Instances", "Size", "img/s")


@dataclass
class Learner:
    """What a training step works on. ``model`` may be wrapped in DDP, or ``shared`` hold what ranks average instead;
    ``ema`` is kept up on rank 0, the others receive its weights when they are to validate them; ``graphs`` when steps
    are replayed as CUDA graphs (:meth:`use_graphs`); ``compiled`` with --compile."""

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
    shared: SharedGradients | None = None
    compiled: CompiledStep | None = None
    graphs: StepGraphs | None = None
    exchanged: bool = False  # DDP has met a batch whose gradients it averages

    def use_graphs(self) -> None:
        """Replay steps as CUDA graphs from now on."""
        self.graphs = StepGraphs(self._backward)

    def backward(self, images: Tensor, targets: Tensor, usual: bool = False, last: bool = True) -> LossParts:
        """Forward, loss and backward of one batch; gradients add up until :meth:`step`.

        images (B, 3, H, W) on the device, uint8 or float in 0..1; targets (T, 6) on the device. ``usual``: not as a
        graph, so that the model's hooks see the batch. ``last``: a step follows, so gradients are averaged over ranks;
        until then each rank adds up its own.
        """
        with self._quiet(last), self.compiled.step(usual) if self.compiled else nullcontext():
            return self.graphs(images, targets, usual) if self.graphs else self._backward(images, targets)

    def _quiet(self, last: bool) -> AbstractContextManager:
        """DDP without messages where no step follows. Its first batch is with them: a static graph learns its order."""
        if not isinstance(self.model, nn.parallel.DistributedDataParallel) or last or not self.exchanged:
            self.exchanged = True
            return nullcontext()
        return self.model.no_sync()

    def _backward(self, images: Tensor, targets: Tensor) -> LossParts:
        """DDP averages gradients over ranks, while hyper-parameters are tuned for the sum over images: hence the
        factor world.size."""
        if images.dtype == torch.uint8:  # here, so that a graph keeps the bytes and not the floats
            images = to_network_input(images, self.device)
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            raw = self.model(images)
        parts = (self.compiled.loss if self.compiled else self.criterion)(raw, targets)
        self.scaler.scale(parts.total * (self.world.size * self.loss_gain)).backward()
        return parts

    def step(self) -> Tensor:
        """Unscale, clip, step, clear the gradients, update the EMA. Returns the gradient norm before clipping.

        A step whose gradient is not finite leaves the weights alone: they then show where it came from.
        """
        if self.shared is not None:
            self.shared.average()
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.optimizer, self.clip_grad)
        step_if_finite(self.optimizer, self.scaler, norm)
        self.clear_gradients()
        if self.ema is not None and self.world.main:
            self.ema.update(self.model)
        return norm

    def clear_gradients(self) -> None:
        """Drop the gradients; graphs and shared gradients need them where they are, and get zeros."""
        self.optimizer.zero_grad(set_to_none=self.graphs is None and self.shared is None)


@dataclass(frozen=True)
class PartialEpoch:
    """How far an epoch got: batches done, and the sums of their losses (box, obj, cls). Between two optimizer steps
    gradients are waiting, so it is always just after one."""

    batches: int
    losses: list[float]


@dataclass(frozen=True)
class EpochResult:
    """Mean losses (box, obj, cls), learning rates by role at the last step, images per second over all ranks."""

    losses: Tensor
    lr: dict[str, float]
    images_per_second: float
    done: PartialEpoch
    unfinished: bool = False


def resize_batch(images: Tensor, rng: np.random.Generator, imgsz: int, stride: int) -> Tensor:
    """Multi-scale training: the batch resized so that its longer side is a random multiple of ``stride`` within
    0.5 to 1.5 times ``imgsz``; sides are rounded up to the stride, bilinear."""
    size = _draw_size(rng, imgsz, stride)
    factor = size / max(images.shape[2:])
    if factor == 1:
        return images
    shape = [math.ceil(side * factor / stride) * stride for side in images.shape[2:]]
    return F.interpolate(images, size=shape, mode="bilinear", align_corners=False)


def _draw_size(rng: np.random.Generator, imgsz: int, stride: int) -> int:
    return int(rng.integers(int(imgsz * 0.5), int(imgsz * 1.5) + stride)) // stride * stride


@dataclass(frozen=True)
class MultiScale:
    """Settings of multi-scale training: the nominal size, the stride, and the seed of the sizes drawn."""

    imgsz: int
    stride: int
    seed: int


def train_one_epoch(
    learner: Learner,
    loader: Iterable,
    epoch: int,
    epochs: int,
    multi_scale: MultiScale | None = None,
    done: PartialEpoch | None = None,
    stop: Callable[[], bool] = lambda: False,
    watch: DcnWatch | None = None,
) -> EpochResult:
    """Run all batches of one epoch. ``loader`` yields utils.dataloaders.Batch and has a length, that of a whole epoch.

    ``done``: the part that an interrupted run did, after which the loader begins. ``stop``: asked after each optimizer
    step; when it says so the result is ``unfinished``. ``watch``: measures the offsets of some steps.

    Raises TrainingDiverged when the loss stops being finite, ResourceError when memory runs out. Gradients left
    over at the end (fewer batches than the accumulation asks for) are dropped, as users' schedules assume.
    """
    learner.model.train()
    learner.clear_gradients()
    first = done.batches if done else 0
    rng = np.random.default_rng((multi_scale.seed, epoch)) if multi_scale else None
    for _ in range(first if multi_scale else 0):
        _draw_size(rng, multi_scale.imgsz, multi_scale.stride)
    meter = _Meter(learner, epoch, epochs, len(loader), done)
    bar = progress(loader, total=len(loader) - first, enabled=learner.world.main)
    images, unfinished = None, False
    if watch:
        watch.start_epoch()
    settings = learner.schedule.at(epoch, max(first - 1, 0))
    try:
        for index, batch in enumerate(bar, first):
            settings = learner.schedule.at(epoch, index)
            learner.schedule.apply(learner.optimizer, settings)
            images = batch.images.to(learner.device, non_blocking=True)
            if multi_scale:
                images = to_network_input(images, learner.device)
                images = resize_batch(images, rng, multi_scale.imgsz, multi_scale.stride)
            targets = batch.targets.to(learner.device, non_blocking=True)
            with watch.step() if watch else nullcontext(False) as measured:
                parts = learner.backward(images, targets, usual=measured, last=settings.optimizer_step)
            if settings.optimizer_step:
                meter.check(learner.step())
            text = meter.add(parts, batch, images.shape[-1])
            if meter.diverged:
                raise diverged(learner, meter.first_bad(), parts, images, meter.recent)
            if text:
                bar.set_description(text, refresh=False)
            if settings.optimizer_step and stop():
                unfinished = True
                break
    except (torch.OutOfMemoryError, MemoryError):
        raise out_of_memory(learner, images) from None
    except RuntimeError as error:
        if not any(sign in str(error) for sign in MEMORY_SIGNS):
            raise
        raise out_of_memory(learner, images) from None
    finally:
        bar.close()
    return EpochResult(meter.finish(), settings.lr, meter.images_per_second, meter.so_far(), unfinished)


class _Meter:
    """Running mean of the losses, kept on the device and read once in a while: reading stalls a GPU's queue."""

    def __init__(
        self, learner: Learner, epoch: int, epochs: int, batches: int, done: PartialEpoch | None = None
    ) -> None:
        self.learner, self.epoch, self.epochs, self.batches = learner, epoch, epochs, batches
        self.read_every = 1 if learner.device.type == "cpu" else 20
        self.total = torch.tensor(done.losses if done else [0.0] * 3, device=learner.device)
        self.finite = torch.ones((), dtype=torch.bool, device=learner.device)
        self.count = done.batches if done else 0
        self.good = torch.tensor(self.count, device=learner.device)  # batches before the first that is not finite
        self.diverged = False
        self.images = 0
        self.recent: list[str] = []
        self.start = time.perf_counter()

    @property
    def images_per_second(self) -> float:
        return self.images * self.learner.world.size / max(time.perf_counter() - self.start, 1e-9)

    def check(self, norm: Tensor) -> None:
        """Take note of a step's gradient norm; a scaler that searches its scale meets infinite ones as a rule."""
        if not self.learner.scaler.is_enabled():
            self.finite &= torch.isfinite(norm)

    def add(self, parts: LossParts, batch, size: int) -> str:
        """Count one batch; returns the bar's text when the losses were read."""
        self.total += parts.items.float()
        self.finite &= torch.isfinite(parts.total.detach()).all()
        self.good += self.finite
        self.count += 1
        self.images += batch.images.shape[0]
        self.recent = (self.recent + list(batch.paths))[-8:]
        if self.count % self.read_every and self.count != self.batches:
            return ""
        self.diverged = not bool(self.finite)
        box, obj, cls = (self.total / self.count).tolist()
        memory = f"{memory_gb(self.learner.device):.3g}G"
        values = (f"{self.epoch}/{self.epochs - 1}", memory, box, obj, cls, len(batch.targets), size)
        return ("%11s" * 2 + "%11.4g" * 3 + "%11i" * 2 + "%11.0f") % (*values, self.images_per_second)

    def first_bad(self) -> str:
        """The first batch whose loss was not finite, in words."""
        return f"epoch {self.epoch}, batch {int(self.good) + 1} of {self.batches}"

    def so_far(self) -> PartialEpoch:
        """What a later start of this epoch needs to know."""
        return PartialEpoch(self.count, self.total.tolist())

    def finish(self) -> Tensor:
        """Over all ranks: each had other images, and as many batches."""
        mine = (self.total / max(self.count, 1)).cpu()
        return torch.stack(gather(mine, self.learner.world)).mean(0)


def log_header() -> None:
    """The column names above an epoch's bar."""
    LOGGER.info("\n" + ("%11s" * len(HEADER)) % HEADER)
