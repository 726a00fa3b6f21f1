"""A detection data set: index -> Sample, for training (augmented) and for evaluation (letterboxed).

Every training sample draws from its own generator, seeded by (seed, epoch, index): the result does not depend on how
many processes load, and a resumed run sees exactly what it would have seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from utils.augmentations import (
    GREY,
    Letterbox,
    Perspective,
    draw_hsv,
    draw_perspective,
    finish,
    flip_labels,
    letterbox,
    mixup,
    warp,
    warp_labels,
)
from utils.batch_memory import BatchMemory, Draws, Ticket, shared_bytes
from utils.config import Hyp
from utils.device_augment import Finish
from utils.dist import World
from utils.errors import DataError
from utils.image_cache import NoCache, make_cache
from utils.images import read_at_least, read_image
from utils.label_cache import scan_labels
from utils.mosaic import mosaic

MOST_REPLACED = 32
"""Images in a row that cannot be read before a tolerant data set gives up: the disk is gone, not a picture."""


class Draw(NamedTuple):
    """What a sampler asks for: image ``index`` in ``epoch``, for the ``repeat``-th time in that epoch (from 0).

    The epoch travels with the index, so loader processes that live for many epochs need not be told about it.
    """

    epoch: int
    index: int
    repeat: int = 0


@dataclass
class Sample:
    """One item. ``image`` uint8 (H, W, 3) RGB contiguous; ``labels`` float32 (n, 5): class, cx, cy, w, h in 0..1;
    ``letterbox`` maps boxes back to the file, None for mosaics and warped images; ``draw`` is what was asked for;
    ``skipped``: why images that should be in it are not (see ``tolerant`` of :class:`DetectionDataset`); ``finish``:
    what the device still has to do to the image (labels are mirrored already)."""

    image: np.ndarray
    labels: np.ndarray
    path: str
    letterbox: Letterbox | None
    draw: Draw
    skipped: tuple[str, ...] = ()
    finish: Finish | None = None


class Samples(list[Sample]):
    """The samples of a batch. ``pixels``: uint8 (B, H, W, 3), the memory that all their images lie in, or None;
    ``ticket`` to give it back with, see :class:`utils.batch_memory.BatchMemory`."""

    pixels: Tensor | None = None
    ticket: Ticket | None = None


class DetectionDataset(Dataset):
    """Images with labels from folders and lists.

    sources: folders of images, .txt lists, files. imgsz: side of the training image in pixels.
    hyp, augment: with ``augment`` samples are training samples by ``hyp`` (default: :class:`Hyp`'s own).
    rect, batch_size, stride, pad: rectangular batches; images are sorted by shape, and ``batch_size`` consecutive
    ones share the smallest frame (a multiple of ``stride``, ``pad`` strides larger) that holds them; no mosaic.
    cache: '', 'ram' or 'disk'. single_cls: all classes become 0. nc or names: to check class numbers.
    strict: the first fault in the data is an error. require_labels: no boxes at all is an error (default: augment).
    close_mosaic_epoch: first epoch (from 0) without mosaic and mixup, None for never.
    tolerant: an image that was fine at the start and cannot be read now (moved, cut short, replaced) is no error: a
    training sample is drawn for the next image instead, an evaluation sample becomes a grey image without labels.

    Raises DataError, see :func:`utils.label_cache.scan_labels`.

    ``labels`` (rows, 5) float32 with ``offsets`` (n + 1): rows of image i are offsets[i]:offsets[i+1].
    ``shapes`` (n, 2) int32: width and height of each file. ``batch_shapes`` (batches, 2): height and width, or None.
    """

    def __init__(
        self,
        sources: str | Path | Iterable[str | Path],
        imgsz: int = 640,
        *,
        hyp: Hyp | None = None,
        augment: bool = False,
        rect: bool = False,
        batch_size: int = 16,
        stride: int = 32,
        pad: float = 0.0,
        cache: str = "",
        single_cls: bool = False,
        nc: int | None = None,
        names: Mapping[int, str] | Sequence[str] | None = None,
        strict: bool = False,
        require_labels: bool | None = None,
        prefix: str = "",
        seed: int = 0,
        close_mosaic_epoch: int | None = None,
        tolerant: bool = False,
        show: bool = True,
    ) -> None:
        self.nc = 1 if single_cls else nc if nc is not None else len(names) if names is not None else None
        require_labels = augment if require_labels is None else require_labels
        index = scan_labels(sources, None if single_cls else self.nc, prefix, strict, require_labels, show)
        if single_cls:
            index = dataclasses.replace(index, labels=index.labels * np.float32((0, 1, 1, 1, 1)))
        self.batch_shapes, self._stride_and_pad = None, (stride, pad)
        if rect:
            order, self.batch_shapes = rect_batches(index.sizes, imgsz, batch_size, stride, pad)
            index = index.reorder(order)
        self.index, self.imgsz, self.rect, self.batch_size = index, imgsz, rect, batch_size
        self.hyp, self.augment, self.seed = hyp or Hyp(), augment, seed % (1 << 32)
        self.close_mosaic_epoch, self.tolerant = close_mosaic_epoch, tolerant
        self.epoch = 0
        self.memory: BatchMemory | None = None  # of the loader processes, shared with the main one
        self.finish_later = False  # colours and mirrors are left to the training device
        self.resized = resized_shapes(index.sizes, imgsz)
        # what is to be enlarged is enlarged by the augmentation itself, from the file's own pixels
        self.loaded = np.minimum(self.resized, index.sizes[:, ::-1]) if augment else self.resized
        self.prefix = f"{prefix}: " if prefix else ""
        self.cache = NoCache()
        self.keep_images(cache)

    def set_batch_size(self, batch_size: int) -> None:
        """Another one than at the start; that of a rectangular set decides which images share a frame."""
        self.batch_size = batch_size
        if self.batch_shapes is not None:  # the images lie in their order already
            _, self.batch_shapes = rect_batches(self.index.sizes, self.imgsz, batch_size, *self._stride_and_pad)

    def keep_images(self, kind: str, world: World = World()) -> None:
        """Fill the cache ``kind``: '', 'ram' or 'disk'. Every process of ``world`` calls this for the same images, and
        those of one machine share them."""
        variant = "reduced" if self.augment else "area"
        self.cache = make_cache(
            kind, self.index.paths, self.loaded, self._read, variant, self.prefix, world, self.tolerant
        )

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> np.ndarray:
        """(rows, 5) float32: class, cx, cy, w, h in 0..1, of all images."""
        return self.index.labels

    @property
    def offsets(self) -> np.ndarray:
        """(n + 1,) int64: image i has rows offsets[i]:offsets[i+1] of ``labels``."""
        return self.index.offsets

    @property
    def shapes(self) -> np.ndarray:
        """(n, 2) int32: width and height of each image file as shown."""
        return self.index.sizes

    def path(self, index: int) -> str:
        """The file of image ``index``."""
        return self.index.paths[index]

    def box_sizes(self, most: int, rng: np.random.Generator) -> np.ndarray:
        """(m, 2) float32 widths and heights in pixels, images scaled to ``imgsz``, of all boxes or ``most`` of them."""
        rows = np.arange(len(self.labels))
        if len(rows) > most:
            rows = np.sort(rng.choice(len(rows), most, replace=False))
        sizes = self.shapes[np.searchsorted(self.offsets, rows, side="right") - 1]
        return self.labels[rows, 3:5] * (sizes * (self.imgsz / sizes.max(1, keepdims=True, initial=1))).astype(
            np.float32
        )

    def class_counts(self) -> np.ndarray:
        """(nc,) int64: boxes of each class."""
        return np.bincount(self.labels[:, 0].astype(np.int64), minlength=self.nc or 0)

    def set_epoch(self, epoch: int) -> None:
        """The epoch for items asked for by plain number (samplers send their own, see :class:`Draw`)."""
        self.epoch = epoch

    def load_image(self, index: int) -> np.ndarray:
        """Image ``index`` scaled to a longest side of ``imgsz`` (in training only if larger): (h, w, 3) uint8 RGB, not
        to be changed in place."""
        cached = self.cache.get(index)
        return self._read(index) if cached is None else cached

    def _read(self, index: int) -> np.ndarray:
        path = self.path(index)
        height, width = map(int, self.loaded[index])
        if self.augment:
            image, size = read_at_least(path, width, height)
        else:
            image = read_image(path)
            size = image.shape[1::-1]
        w0, h0 = map(int, self.shapes[index])
        if tuple(size) != (w0, h0):
            raise DataError(f"{path}: is {size[0]}x{size[1]} pixels but was {w0}x{h0} at the start")
        if image.shape[:2] == (height, width):
            return image
        # area averages when shrinking; in training linear, which is faster and leaves detail to be augmented
        linear = self.augment or self.imgsz > max(h0, w0)
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR if linear else cv2.INTER_AREA)

    def __getitem__(self, item: int | Draw) -> Sample:
        return self._sample(item)

    def __getitems__(self, items: Sequence[int | Draw]) -> Samples:
        """The samples of a batch, their images written into one block of memory (asked for by torch's loader)."""
        if not (items and self.augment):
            return Samples([self._sample(item) for item in items])
        height, width = _pair(self._frame(items[0].index if isinstance(items[0], Draw) else int(items[0])))
        pixels, ticket = self._memory_for((len(items), height, width, 3), items)
        try:
            samples = Samples([self._sample(item, pixels[place].numpy()) for place, item in enumerate(items)])
        except BaseException:
            self._give_back(ticket)
            raise
        if all(np.shares_memory(s.image, pixels[place].numpy()) for place, s in enumerate(samples)):
            samples.pixels, samples.ticket = pixels, ticket
        else:
            self._give_back(ticket)
        return samples

    def _memory_for(self, shape: tuple[int, ...], items: Sequence[int | Draw]) -> tuple[Tensor, Ticket | None]:
        worker = get_worker_info()
        if self.memory is None or worker is None or not isinstance(items, Draws):
            return shared_bytes(shape), None
        return self.memory.take(shape, worker.id, items.stream)

    def _give_back(self, ticket: Ticket | None) -> None:
        if self.memory is not None:
            self.memory.give_back(ticket)

    def _sample(self, item: int | Draw, out: np.ndarray | None = None) -> Sample:
        draw = item if isinstance(item, Draw) else Draw(self.epoch, int(item))
        if not 0 <= draw.index < len(self):
            raise IndexError(draw.index)
        make = partial(self._training_sample, out=out) if self.augment else self._evaluation_sample
        if not self.tolerant:
            return make(draw)
        try:
            return make(draw)
        except DataError as error:
            return self._replacement(draw, str(error), out)

    def _replacement(self, draw: Draw, reason: str, out: np.ndarray | None) -> Sample:
        """A sample for one whose image cannot be read any more; the reasons travel with it."""
        if not self.augment:
            frame = self._frame(draw.index)
            height, width = _pair(frame)
            grey = np.full((height, width, 3), GREY, np.uint8)
            w0, h0 = map(int, self.shapes[draw.index])
            box = Letterbox((h0, w0), (width / w0, height / h0), (0.0, 0.0))
            return Sample(grey, np.zeros((0, 5), np.float32), self.path(draw.index), box, draw, (reason,))
        skipped, frame = [reason], self._frame(draw.index)
        for step in range(1, min(len(self), MOST_REPLACED)):
            try:
                sample = self._training_sample(draw._replace(index=(draw.index + step) % len(self)), out, frame)
            except DataError as error:
                skipped.append(str(error))
                continue
            sample.skipped = tuple(dict.fromkeys(skipped))
            return sample
        raise DataError(f"{reason}; {len(skipped)} images in a row cannot be read: is the data set still there?")

    def _frame(self, index: int) -> int | tuple[int, int]:
        if self.batch_shapes is None:
            return self.imgsz
        height, width = self.batch_shapes[index // self.batch_size]
        return int(height), int(width)

    def _boxed(
        self, index: int, scaleup: bool, frame: int | tuple[int, int] | None = None
    ) -> tuple[np.ndarray, Letterbox]:
        """The image in ``frame`` (its own), and the map from the file's pixels to the frame's."""
        image = self.load_image(index)
        h, w = image.shape[:2]
        w0, h0 = map(int, self.shapes[index])
        frame = self._frame(index) if frame is None else frame
        image, box = letterbox(image, frame, auto=False, scaleup=scaleup)
        return image, Letterbox((h0, w0), (box.ratio[0] * w / w0, box.ratio[1] * h / h0), box.pad)

    def _evaluation_sample(self, draw: Draw) -> Sample:
        image, box = self._boxed(draw.index, scaleup=False)
        labels = to_unit(self._pixel_labels(draw.index, box), image.shape)
        return Sample(image, labels, self.path(draw.index), box, draw)

    def _pixel_labels(self, index: int, box: Letterbox) -> np.ndarray:
        """(n, 5) class, x1, y1, x2, y2 in the frame's pixels."""
        labels = self.index.rows(index).copy()
        w, h = self.shapes[index] * box.ratio
        centre, half = labels[:, 1:3].copy(), labels[:, 3:5] / 2
        labels[:, 1:3] = (centre - half) * np.float32((w, h)) + np.float32(box.pad)
        labels[:, 3:5] = (centre + half) * np.float32((w, h)) + np.float32(box.pad)
        return labels

    def _training_sample(
        self, draw: Draw, out: np.ndarray | None = None, frame: int | tuple[int, int] | None = None
    ) -> Sample:
        """``frame``: side or (height, width), where the sample stands in for one of another frame."""
        rng = np.random.default_rng((self.seed, draw.epoch, draw.index, draw.repeat))
        hyp, box = self.hyp, None
        closed = self.close_mosaic_epoch is not None and draw.epoch >= self.close_mosaic_epoch
        if not self.rect and not closed and rng.random() < hyp.mosaic:
            image, labels = self._mosaic(draw.index, rng, out if self.finish_later else None)
            if rng.random() < hyp.mixup:
                other = self._mosaic(int(rng.integers(len(self))), rng)
                image, labels = mixup((image, labels), other, rng.beta(32.0, 32.0))
        else:
            image, labels, box = self._warped(draw.index, rng, frame)
        labels = to_unit(labels, image.shape)
        factors = draw_hsv(rng, (hyp.hsv_h, hyp.hsv_s, hyp.hsv_v))
        mirrored = bool(rng.random() < hyp.flipud), bool(rng.random() < hyp.fliplr)
        if out is not None and out.shape[:2] != image.shape[:2]:
            out = None
        later = Finish(tuple(factors.tolist()), *mirrored) if self.finish_later else None
        if later is None:
            image = finish(image, factors, *mirrored, out)
        elif image is not out:
            image = finish(image, np.ones(3), False, False, out)
        return Sample(image, flip_labels(labels, *mirrored), self.path(draw.index), box, draw, finish=later)

    def _mosaic(
        self, index: int, rng: np.random.Generator, frame: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        chosen = [index, *map(int, rng.integers(len(self), size=3))]
        chosen = [chosen[k] for k in rng.permutation(4)]
        return mosaic(
            lambda k: self.load_image(chosen[k]),
            list(map(tuple, self.resized[chosen].tolist())),
            list(map(tuple, self.loaded[chosen].tolist())),
            [self.index.rows(i) for i in chosen],
            [self.index.segments(i) for i in chosen],
            self.imgsz,
            rng,
            self._draw_perspective(rng),
            self.hyp.copy_paste,
            frame,
        )

    def _draw_perspective(self, rng: np.random.Generator) -> Perspective:
        hyp = self.hyp
        return draw_perspective(rng, hyp.degrees, hyp.translate, hyp.scale, hyp.shear, hyp.perspective)

    def _warped(
        self, index: int, rng: np.random.Generator, frame: int | tuple[int, int] | None
    ) -> tuple[np.ndarray, np.ndarray, Letterbox | None]:
        image, box = self._boxed(index, True, frame)
        frame = image.shape[:2]
        draw = self._draw_perspective(rng)
        matrix = draw.matrix(frame, frame)
        segments = self.index.segments(index)
        if segments is not None:
            scale = self.shapes[index] * box.ratio
            segments = [np.float32(s * scale + box.pad) for s in segments]
        labels = warp_labels(self._pixel_labels(index, box), segments, draw, matrix, frame)
        warped = warp(image, matrix, frame)
        return warped, labels, box if warped is image else None


def _pair(side: int | tuple[int, int]) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else side


def to_unit(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(n, 5) class, x1, y1, x2, y2 in pixels of an image of ``shape`` (h, w, ...) -> class, cx, cy, w, h in 0..1.

    Boxes are clipped to the image, a thousandth of a pixel short of its far edges.
    """
    h, w = shape[:2]
    corners = np.clip(labels[:, 1:5], 0, np.float32((w - 1e-3, h - 1e-3, w - 1e-3, h - 1e-3)))
    unit = np.empty_like(labels)
    unit[:, 0] = labels[:, 0]
    unit[:, 1:3] = (corners[:, :2] + corners[:, 2:]) / 2 / np.float32((w, h))
    unit[:, 3:5] = (corners[:, 2:] - corners[:, :2]) / np.float32((w, h))
    return unit


def resized_shapes(sizes: np.ndarray, imgsz: int) -> np.ndarray:
    """(n, 2) widths and heights -> (n, 2) heights and widths with the longest side at ``imgsz``, rounded up."""
    ratio = imgsz / sizes.max(1, keepdims=True, initial=1)
    # rounded first: 147 * (640 / 147) is a hair over 640 and must not become 641
    return np.ceil(np.round(sizes * ratio, 6)).astype(np.int32)[:, ::-1]


def rect_batches(
    sizes: np.ndarray, imgsz: int, batch_size: int, stride: int, pad: float
) -> tuple[np.ndarray, np.ndarray]:
    """Order images by height / width and find the frame of each batch.

    ``sizes`` (n, 2): width, height. Returns the order (n,) and the frames (batches, 2): height, width.
    """
    aspect = sizes[:, 1] / sizes[:, 0]
    order = aspect.argsort(kind="stable")
    aspect = aspect[order]
    frames = []
    for start in range(0, len(sizes), batch_size):
        low, high = aspect[start], aspect[min(start + batch_size, len(sizes)) - 1]
        h, w = (high, 1.0) if high < 1 else (1.0, 1 / low) if low > 1 else (1.0, 1.0)
        frames.append([math.ceil(side * imgsz / stride + pad) * stride for side in (h, w)])
    return order, np.array(frames, np.int32)


def class_weights(classes: np.ndarray, nc: int) -> np.ndarray:
    """(nc,) weights of rare classes: 1 / count, normalised to sum 1 (a class without boxes counts as one box)."""
    counts = np.bincount(classes.astype(np.int64), minlength=nc)
    weights = 1 / np.maximum(counts, 1)
    return weights / weights.sum()


def image_weights(classes: np.ndarray, offsets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n,) sum of the class weights over each image's boxes; ``classes`` (rows,), ``offsets`` (n + 1,)."""
    total = np.concatenate(([0.0], np.cumsum(weights[classes.astype(np.int64)])))
    return total[offsets[1:]] - total[offsets[:-1]]
