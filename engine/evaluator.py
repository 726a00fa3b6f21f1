"""One pass over a labelled split: model -> NMS -> matching -> Metrics. Used by val.py and, each epoch, by the trainer.

Files (labels, JSON, pictures) are written by observers, engine/eval_outputs.py; the pass itself writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.background import Background, now
from utils.batched_nms import recorded_step
from utils.boxes import cxcywh_to_xyxy, scale_to_original
from utils.config import check_thresholds
from utils.confusion import ConfusionMatrix
from utils.console import LOGGER, progress
from utils.cuda_graphs import CudaGraphs
from utils.device import to_network_input
from utils.dist import World, gather_to_main
from utils.matching import image_of, joined, match_predictions
from utils.metrics import TABLE_HEADER, Metrics, ap_per_class, iou_thresholds
from utils.nms import non_max_suppression
from utils.side_stream import SideStream, one_late
from utils.stages import STAGES, StageTimes

if TYPE_CHECKING:
    from utils.dataloaders import Batch

PRE_PROCESS, INFERENCE, NMS = STAGES

NMS_RECORD_AT = 20
"""A batch takes some eight blocks of NMS: what comes once, as an epoch's smaller last batch, is not recorded."""
MOST_RECORDED = 1000
"""Up to so many detections an image: a recorded block always meets the boxes of so many."""

CPU_CHUNK = 4
"""Images per forward pass on the CPU, where larger batches overflow the caches: on two cores yolov5s takes 91 ms an
image in fours and 98 in eights, yolov5n 32 in fours and 41 in sixteens (512 x 672, channels last, as loaded)."""


@dataclass(frozen=True, eq=False)
class ImageResult:
    """One image after matching. Everything is on the CPU, in pixels of the original image.

    ``detections`` (n, 6) float32 x1, y1, x2, y2, confidence, class, by falling confidence; ``labels`` (m, 5) float32
    class, x1, y1, x2, y2; ``size`` (height, width).
    """

    path: str
    size: tuple[int, int]
    detections: Tensor
    labels: Tensor


Observer = Callable[["Batch", Sequence[Tensor], Sequence[ImageResult]], None]
"""Called after each batch with the batch, its detections (n, 6) an image in network pixels, and the results."""


def evaluate(
    model: Callable[[Tensor], tuple[Tensor, Any]],
    loader: Iterable[Batch],
    *,
    device: torch.device,
    names: Mapping[int, str],
    conf_thres: float = 0.001,
    iou_thres: float = 0.6,
    max_det: int = 300,
    single_cls: bool = False,
    amp_dtype: torch.dtype | None = None,
    criterion: Callable[[Any, Tensor], Any] | None = None,
    hybrid: bool = False,
    overlap: bool = False,
    observers: Sequence[Observer] = (),
    on_last: Callable[[], None] | None = None,
    show_progress: bool = True,
    world: World = World(),
) -> Metrics | None:
    """Precision, recall, mAP and losses of ``model`` over ``loader``.

    ``model``: images (B, 3, H, W) float in 0..1 -> (decoded (B, N, 5+nc), raw); a module is put into eval mode and
    back. ``names``: {class: name}, as many as the data set has classes. ``amp_dtype``: autocast dtype, None for
    float32. ``criterion``: (raw, targets (T, 6)) -> LossParts, for the validation losses. ``single_cls`` ignores
    classes; ``hybrid`` lets the labels take part in NMS (which inflates every score). ``overlap``: on CUDA, NMS is
    replayed as a graph beside the next batch's forward pass; takes more memory, some 0.6 GB and a batch, and the times
    of these two stages contain one another.

    ``world``: all of its processes call this together, each with the same model and a loader of its share of the
    batches (the k-th of rank r is number k * size + r of all). Rank 0 gets the metrics of all, the same as one process
    would; the others None. Observers see their own rank's batches. ``on_last`` is called once they have seen them all,
    before the metrics are computed.

    Boxes are matched in pixels of the original images, at most ``max_det`` an image. Raises ConfigError for a bad
    threshold.
    """
    check_thresholds(conf_thres, iou_thres, max_det)
    times, losses, tally = StageTimes(device), _Losses(), _Tally(len(names))
    shape: tuple[int, ...] = ()
    background = Background(most=8)  # so much unrest in loading and matching is evened out
    later = background if _has_time(device) else now
    side = SideStream(device) if overlap and device.type == "cuda" else None
    record = partial(CudaGraphs, what="NMS", record_at=NMS_RECORD_AT)
    recorded = recorded_step(iou_thres, max_det, record) if side and max_det <= MOST_RECORDED else None
    with _eval_mode(model), torch.inference_mode():
        batches = progress(loader, desc=TABLE_HEADER, enabled=show_progress and world.main)
        outputs = _outputs(model, batches, device, amp_dtype, criterion, times, losses, side)
        for output in one_late(outputs) if side else outputs:
            batch = output.batch
            shape = shape or tuple(batch.images.shape)
            with output.ready(side):
                with times.stage(NMS):
                    detections = non_max_suppression(
                        output.decoded,
                        conf_thres,
                        iou_thres,
                        agnostic=single_cls,
                        multi_label=True,
                        max_det=max_det,
                        labels=_labels_in_pixels(output.targets, batch.images.shape) if hybrid else (),
                        recorded=recorded,
                    )
                detections = _to_cpu(detections)
            background.check()  # what ends the pass ends it now
            # nobody else has them, so that they need no copies
            later(partial(_take_note, batch, detections, single_cls, tally, times, observers))
        background.wait()
    if on_last:
        on_last()
    shares = gather_to_main(_Share(tally, losses.values(), times.per_image(tally.images), shape), world)
    return _metrics(shares) if world.main else None


@dataclass(frozen=True, eq=False)
class _Output:
    """A batch after the forward pass: ``targets`` (T, 6) and ``decoded`` (B, N, 5+nc) on the device."""

    batch: Batch
    targets: Tensor
    decoded: Tensor
    mark: Any = None

    def ready(self, side: SideStream | None) -> AbstractContextManager[None]:
        """A block in which it is there."""
        return side.after(self.mark, self.targets, self.decoded) if side else nullcontext()


def _outputs(
    model: Callable[[Tensor], tuple[Tensor, Any]],
    batches: Iterable[Batch],
    device: torch.device,
    amp_dtype: torch.dtype | None,
    criterion: Callable[[Any, Tensor], Any] | None,
    times: StageTimes,
    losses: _Losses,
    side: SideStream | None,
) -> Iterator[_Output]:
    """Every batch through the model and the losses."""
    for batch in batches:
        with times.stage(PRE_PROCESS):
            images = to_network_input(batch.images, device)
            targets = batch.targets.to(device, non_blocking=True)
        with times.stage(INFERENCE), torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            decoded, raw = _forward(model, images)
        if criterion is not None:
            losses.add(criterion(raw, targets))
        if side:  # the model may write its next output to the same place
            decoded = decoded.clone()
        yield _Output(batch, targets, decoded, side and side.mark())


def _has_time(device: torch.device) -> bool:
    """Whether the CPU waits while the model is at work."""
    return device.type == "cuda"


def _take_note(
    batch: Batch,
    detections: Sequence[Tensor],
    single_cls: bool,
    tally: _Tally,
    times: StageTimes,
    observers: Sequence[Observer],
) -> None:
    """Match the detections of a batch, count them, show them to the observers."""
    start = time.perf_counter()
    with torch.inference_mode():
        results = _results(batch, detections, single_cls)
        tally.add(results)
        times.add("matching", time.perf_counter() - start)
        for observer in observers:
            observer(batch, detections, results)


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    training = isinstance(model, nn.Module) and model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _forward(model: Callable[[Tensor], tuple[Tensor, Any]], images: Tensor) -> tuple[Tensor, Any]:
    """The model's output for the whole batch; on the CPU computed in chunks, which is faster and gives the same. An
    exported file of one batch size gets chunks of that size."""
    at_once = getattr(model, "at_once", None) or CPU_CHUNK
    if images.device.type != "cpu" or len(images) <= at_once:
        return model(images)
    decoded, raw = zip(*(model(chunk) for chunk in images.split(at_once)))
    return torch.cat(decoded), None if raw[0] is None else [torch.cat(level) for level in zip(*raw)]


def _to_cpu(detections: list[Tensor]) -> list[Tensor]:
    """All detections of a batch to the CPU in one transfer."""
    return list(torch.cat(detections).cpu().split([len(rows) for rows in detections]))


def _labels_in_pixels(targets: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Targets (T, 6) in 0..1 -> one (m, 5) an image, class, cx, cy, w, h in network pixels."""
    count, _, height, width = shape
    scaled = targets[:, 1:] * targets.new_tensor([1, width, height, width, height])
    return [scaled[targets[:, 0] == index] for index in range(count)]


def _results(batch: Batch, detections: Sequence[Tensor], single_cls: bool) -> list[ImageResult]:
    """Detections and labels of a batch in pixels of the original images."""
    labels = _labels_in_pixels(batch.targets.cpu(), batch.images.shape)
    found, given = joined(detections, 6), joined(labels, 5)
    found[:, :4] = _in_originals(found[:, :4], detections, batch)
    given[:, 1:] = _in_originals(cxcywh_to_xyxy(given[:, 1:]), labels, batch)
    if single_cls:
        found[:, 5], given[:, 0] = 0, 0
    found = torch.from_numpy(found).split([len(rows) for rows in detections])
    given = torch.from_numpy(given).split([len(rows) for rows in labels])
    sizes = [tuple(box.original) for box in batch.letterboxes]
    return [ImageResult(*parts) for parts in zip(batch.paths, sizes, found, given)]


def _in_originals(boxes: np.ndarray, parts: Sequence[Tensor], batch: Batch) -> np.ndarray:
    """(n, 4) corners in network pixels, ``parts`` of each image, in pixels of the original images."""
    image = image_of(parts)
    ratio = np.array([box.ratio[1] for box in batch.letterboxes])[image]
    left, top = np.array([box.pad for box in batch.letterboxes])[image].T
    height, width = np.array([box.original for box in batch.letterboxes])[image].T
    return scale_to_original(boxes, tuple(batch.images.shape[2:]), (height, width), ratio, (left, top))


class _Tally:
    """True positives, confidences and classes of all images so far, batch by batch: in what order equal confidences
    come decides metrics in their last digits, and batches of several ranks are to come as those of one."""

    def __init__(self, nc: int) -> None:
        self.images = 0
        self.correct: list[np.ndarray] = []  # (n, t) bool for each batch
        self.detections: list[np.ndarray] = []  # (n, 6)
        self.targets: list[np.ndarray] = []  # (m,) classes
        self.confusion = ConfusionMatrix(nc)

    def add(self, results: Sequence[ImageResult]) -> None:
        """Match the images of a batch."""
        found, labels = (
            [part.numpy() for part in parts] for parts in zip(*((r.detections, r.labels) for r in results))
        )
        self.images += len(results)
        self.correct.append(match_predictions(found, labels, iou_thresholds()))
        self.detections.append(np.concatenate(found))
        self.targets.append(np.concatenate(labels)[:, 0])
        self.confusion.update(found, labels)


class _Losses:
    """Box, obj and cls loss of each batch; they stay on the device until :meth:`values`."""

    def __init__(self) -> None:
        self._items: list[Tensor] = []

    def add(self, parts: Any) -> None:
        self._items.append(parts.items.float().reshape(3))

    def values(self) -> np.ndarray:
        """(batches, 3) float32."""
        return torch.stack(self._items).cpu().numpy() if self._items else np.zeros((0, 3), np.float32)


@dataclass(frozen=True, eq=False)
class _Share:
    """What one rank found: its batches, their losses (batches, 3), milliseconds an image, shape of its first batch."""

    tally: _Tally
    losses: np.ndarray
    speed: Mapping[str, float]
    shape: tuple[int, ...]


def _metrics(shares: Sequence[_Share]) -> Metrics:
    """The metrics of all ranks' batches, taken in the order in which one process would have met them."""
    tallies = [share.tally for share in shares]
    images = sum(tally.images for tally in tallies)
    correct, detections, targets, losses = (
        _interleaved(parts)
        for parts in (
            [tally.correct for tally in tallies],
            [tally.detections for tally in tallies],
            [tally.targets for tally in tallies],
            [list(share.losses) for share in shares],
        )
    )
    labels = np.concatenate([np.zeros(0, np.float32), *targets])
    if images and not len(labels):
        LOGGER.warning("no labels found in this split: there is nothing to compute metrics from")
    found = np.concatenate([np.zeros((0, 6), np.float32), *detections])
    hits = np.concatenate([np.zeros((0, len(iou_thresholds())), bool), *correct])
    speed = {
        stage: sum(share.speed[stage] * share.tally.images for share in shares if share.tally.images) / max(images, 1)
        for stage in max((share.speed for share in shares), key=len)
    }
    return Metrics(
        ap_per_class(hits, found[:, 4], found[:, 5], labels),
        images,
        tuple(np.mean(losses, 0).tolist()) if losses else (0.0, 0.0, 0.0),
        speed,
        shares[0].shape,
        sum(tally.confusion.matrix for tally in tallies),
    )


def _interleaved(shares: Sequence[Sequence[Any]]) -> list[Any]:
    """Every rank's batches, dealt out one by one, back in their order."""
    rounds = max(map(len, shares))
    return [share[turn] for turn in range(rounds) for share in shares if turn < len(share)]
