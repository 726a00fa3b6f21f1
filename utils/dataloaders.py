"""Batches: which images in which order, how samples are joined, and the loader processes."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from types import TracebackType

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from utils.augmentations import Letterbox
from utils.batch_memory import BatchMemory, Draws, Ticket
from utils.console import LOGGER, plural
from utils.cores import available_cores, may_have_children
from utils.dataset import DetectionDataset, Draw, Sample
from utils.device_augment import finish_batch, pack
from utils.dist import World
from utils.errors import ResourceError, UserError, explain_lost_worker
from utils.repeats import earlier
from utils.signals import interrupts_deferred, outlive_first_sigterm


@dataclass
class Batch:
    """Samples joined.

    ``images`` uint8 (B, 3, H, W) RGB, channels last in memory; ``targets`` float32 (T, 6): image index in the batch,
    class, cx, cy, w, h in 0..1 of the image; ``paths`` and ``letterboxes`` (None for mosaics), one for each image;
    ``skipped``: why images that should be in it are not. ``finishes`` (B, 5): what is left to do to the images, None
    when nothing (see :mod:`utils.device_augment`). ``ticket``: the images lie in a loader process's memory, which it
    waits to have back (only until the loader hands the batch out).
    """

    images: Tensor
    targets: Tensor
    paths: list[str]
    letterboxes: list[Letterbox | None]
    skipped: Sequence[str] = ()
    finishes: Tensor | None = None
    ticket: Ticket | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """A batch with its tensors on ``device``."""
        images = self.images.to(device, non_blocking=non_blocking)
        return replace(self, images=images, targets=self.targets.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """A batch with its tensors in page-locked memory (called by torch's loader)."""
        finishes = None if self.finishes is None else self.finishes.pin_memory()
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory(), finishes=finishes)

    def finished(self, device: torch.device) -> Batch:
        """The batch with its images on ``device`` and all done that was left to it."""
        if self.finishes is None:
            return self
        images = finish_batch(self.images.to(device, non_blocking=True), self.finishes)
        return replace(self, images=images, finishes=None)


def collate(samples: Sequence[Sample]) -> Batch:
    """Join samples of one size. In a loader process the images go straight to shared memory."""
    pixels = getattr(samples, "pixels", None)
    if pixels is None:  # torch's own collate knows how to allocate shared memory
        pixels = default_collate([torch.from_numpy(s.image) for s in samples])
    images = pixels.permute(0, 3, 1, 2)  # costs nothing and is the channels-last layout that GPUs convolve fastest
    counts = [len(s.labels) for s in samples]
    targets = np.empty((sum(counts), 6), np.float32)
    targets[:, 0] = np.repeat(np.arange(len(samples)), counts)
    targets[:, 1:] = np.concatenate([s.labels for s in samples])
    skipped = [reason for sample in samples for reason in sample.skipped]
    finishes = [s.finish for s in samples]
    return Batch(
        images,
        torch.from_numpy(targets),
        [s.path for s in samples],
        [s.letterbox for s in samples],
        skipped,
        None if None in finishes else pack(finishes),
        getattr(samples, "ticket", None),
    )


def collate_quad(samples: Sequence[Sample]) -> Batch:
    """Join four samples each into one image of twice the size: half of the time four tiles, else the first, enlarged.

    B samples give B // 4 images. The tiles go down the left column, then down the right.
    """
    joined = []
    for first in range(0, len(samples) // 4 * 4, 4):
        four = samples[first : first + 4]
        rng = np.random.default_rng((four[0].draw.epoch, four[0].draw.index, four[0].draw.repeat, 4))
        if rng.random() < 0.5:
            h, w = four[0].image.shape[:2]
            image, labels = cv2.resize(four[0].image, (2 * w, 2 * h), interpolation=cv2.INTER_LINEAR), four[0].labels
        else:
            left, right = (np.concatenate([s.image for s in pair]) for pair in (four[:2], four[2:]))
            image = np.concatenate((left, right), 1)
            places = np.float32([(0, 0, 0, 0, 0), (0, 0, 1, 0, 0), (0, 1, 0, 0, 0), (0, 1, 1, 0, 0)])
            moved = [(s.labels + place) * np.float32((1, 0.5, 0.5, 0.5, 0.5)) for s, place in zip(four, places)]
            labels = np.concatenate(moved)
        skipped = tuple(reason for sample in four for reason in sample.skipped)
        joined.append(replace(four[0], image=image, labels=labels, letterbox=None, skipped=skipped))
    return collate(joined)


class EpochSampler:
    """The images of one rank in one epoch; a pure function of (seed, epoch, rank), so a resumed run repeats it.

    length: images in the set. shuffle: a new order each epoch. rank, size: this process and how many there are.
    block: images that stay together (the batch of rectangular batches). even: give every rank the same number,
    repeating images (training, where ranks step together); otherwise every image comes exactly once (evaluation).
    """

    def __init__(
        self,
        length: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        size: int = 1,
        block: int = 1,
        even: bool = True,
    ) -> None:
        self.length, self.shuffle, self.seed = length, shuffle, seed
        self.rank, self.size, self.block, self.even = rank, size, block, even
        self.weights: np.ndarray | None = None

    def order(self, epoch: int) -> np.ndarray:
        """(n,) image numbers of an epoch for all ranks together."""
        rng = np.random.default_rng((self.seed, epoch))
        if self.weights is not None and self.weights.sum() > 0:
            return rng.choice(self.length, self.length, p=self.weights / self.weights.sum())
        return rng.permutation(self.length) if self.shuffle else np.arange(self.length)

    def _share(self, order: np.ndarray) -> np.ndarray:
        if self.size == 1:
            return order
        if self.block == 1:
            whole = -(-len(order) // self.size) * self.size
            return (np.resize(order, whole) if self.even and len(order) else order)[self.rank :: self.size]
        blocks = [order[i : i + self.block] for i in range(0, len(order), self.block)]
        if self.even and blocks:
            blocks[-1] = np.resize(blocks[-1], self.block)
            blocks = [blocks[i % len(blocks)] for i in range(-(-len(blocks) // self.size) * self.size)]
        return np.concatenate(blocks[self.rank :: self.size] or [order[:0]])

    def draws(self, epoch: int) -> Iterator[Draw]:
        """What this rank loads in an epoch, in order."""
        indices = self._share(self.order(epoch))
        for index, repeat in zip(indices.tolist(), earlier(indices).tolist()):
            yield Draw(epoch, index, repeat)

    def __len__(self) -> int:
        return len(self._share(np.arange(self.length)))


class EpochBatches(Sampler[list[Draw]]):
    """The sampler's draws in batches of ``batch_size``, from ``epoch`` on: one epoch, or with ``endless`` one after
    another, so that loader processes go on with the next epoch while this one is still being used."""

    def __init__(self, sampler: EpochSampler, batch_size: int, drop_last: bool, endless: bool) -> None:
        self.sampler, self.batch_size, self.drop_last, self.endless = sampler, batch_size, drop_last, endless
        self.epoch = self.start = self.stream = 0
        self.epochs: int | None = None  # there are no more than these: nothing is loaded ahead beyond

    def __iter__(self) -> Iterator[list[Draw]]:
        done = self.start * self.batch_size
        self.stream += 1
        for epoch in count(self.epoch) if self.endless and len(self) else [self.epoch]:
            if self.epochs is not None and epoch >= self.epochs:
                return
            draws = islice(self.sampler.draws(epoch), done, None)
            done = 0
            while batch := Draws(islice(draws, self.batch_size)):
                batch.stream = self.stream
                if len(batch) == self.batch_size or not self.drop_last:
                    yield batch

    def __len__(self) -> int:
        """Batches of one epoch."""
        full, rest = divmod(len(self.sampler), self.batch_size)
        return full + (rest > 0 and not self.drop_last)


class DetectionLoader(DataLoader):
    """torch's loader, one epoch an iteration, with failures of its processes told in one line.

    Iterating gives the epoch set by :meth:`set_epoch`. Epochs that follow each other come out of one stream, whose
    processes load ahead across their border: neither a validation in between nor a new epoch finds them empty.
    """

    _stream: Iterator[Batch] | None = None
    _stream_epoch = -1  # what the stream holds next
    _warned: frozenset[str] = frozenset()
    finish_on: torch.device | None = None  # where the rest of the augmentation is done; None: nothing is left
    on_batch: Callable[[Batch], None] | None = None  # sees each batch before it is handed out

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The epoch (from 0) that the next iteration is for, and the batch (from 0) it begins with."""
        self.batch_sampler.epoch, self.batch_sampler.start = epoch, start
        self.dataset.set_epoch(epoch)

    def set_weights(self, weights: np.ndarray | None) -> None:
        """Draw images with replacement by these (n,) weights from the next epoch on, or each once again (None).
        The weights may change with every epoch, so nothing is loaded ahead across epochs from then on."""
        self.batch_sampler.sampler.weights = weights
        self.batch_sampler.endless = self.batch_sampler.endless and weights is None
        self._stream_epoch = -1

    def begin(self) -> None:
        """Have processes that live on begin with the epoch set, beside what is done before its iteration."""
        if self.batch_sampler.endless and self._stream_epoch != self.batch_sampler.epoch:
            self._open_stream()
            self._stream_epoch = self.batch_sampler.epoch

    def _open_stream(self) -> None:
        with interrupts_deferred():  # Ctrl-C while processes start would be lost in them
            self._stream = super().__iter__()

    def close(self) -> None:
        """End its processes: each when the batch that it is at is done. A later iteration starts others.

        A loader that is forgotten ends them as well. But an exception keeps it until garbage is collected, in which
        the message that ends them is lost (torch waits up to 10 seconds for each), and the end of Python waits for
        those that stay after a first SIGTERM.
        """
        stream, self._stream, self._iterator, self._stream_epoch = self._stream, None, None, -1
        if stream is not None and self.num_workers:
            stream._shutdown_workers()

    def __iter__(self) -> Iterator[Batch]:
        return self._clear_errors(self._epoch())

    def _epoch(self) -> Iterator[Batch]:
        epoch = self.batch_sampler.epoch
        if not self.batch_sampler.endless or self._stream_epoch != epoch:
            self._open_stream()
        self._stream_epoch = -1  # an iteration that is left before its end leaves the stream in mid-epoch
        for batch in islice(self._stream, len(self) - self.batch_sampler.start):
            self._warn(batch.skipped)
            batch = self._taken_out(batch)
            batch = batch if self.finish_on is None else batch.finished(self.finish_on)
            if self.on_batch:
                self.on_batch(batch)
            yield batch
        self._stream_epoch = epoch + 1

    def _taken_out(self, batch: Batch) -> Batch:
        """The batch in memory of its own; the loader process has its block back."""
        if batch.ticket is None:
            return batch
        images = batch.images if self.pin_memory else batch.images.clone()  # pinning has copied them
        self.dataset.memory.give_back(batch.ticket)
        return replace(batch, images=images, ticket=None)

    def _warn(self, skipped: Sequence[str]) -> None:
        """Name each image that can no longer be read, once, and count them."""
        for reason in skipped:
            if reason not in self._warned:
                self._warned |= {reason}
                total = plural(len(self._warned), "image")
                LOGGER.warning(f"{reason}; training goes on without it ({total} so far; --strict-data stops)")

    def _clear_errors(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        try:
            yield from batches
        except UserError as error:  # from a process: torch put the whole traceback in the text
            name = type(error).__name__ + ": "
            text = str(error).strip()
            raise type(error)(text.rsplit(name, 1)[-1].splitlines()[0]) from None
        except RuntimeError as error:
            line = explain_lost_worker(error)
            if line is None:
                raise
            raise ResourceError(line) from None


def create_dataloader(
    dataset: DetectionDataset,
    batch_size: int,
    *,
    shuffle: bool = False,
    workers: int = 8,
    world: World = World(),
    seed: int = 0,
    quad: bool = False,
    persistent: bool = True,
    patient: bool = True,
    finish_on: torch.device | None = None,
) -> DetectionLoader:
    """This process's batches of a data set.

    ``workers`` is cut to the cores of this process's share and to the batch size; a process that may have no children
    loads by itself. A training set (``augment``) is shared out evenly, an evaluation set exactly. A rectangular set
    keeps its own order and batch size. ``quad`` joins four images into one (drops the last, incomplete batch).
    ``persistent`` processes live for all epochs and load ahead into the next one; ``patient`` ones stay after a first
    SIGTERM, for what a training has to finish. ``finish_on``: colours and mirrors of training images are left to this
    device; batches come with their images there (not with ``quad``, which joins finished images).
    """
    batch_size = max(1, min(batch_size, len(dataset)))
    if dataset.rect:
        batch_size, shuffle = dataset.batch_size, False
    sampler = EpochSampler(
        len(dataset),
        shuffle=shuffle,
        seed=seed,
        rank=world.rank,
        size=world.size,
        block=batch_size if dataset.rect else 1,
        even=dataset.augment,
    )
    processes = min(workers, max(available_cores() // world.sharers, 1), batch_size if batch_size > 1 else 0)
    processes = processes if may_have_children() else 0
    persistent = persistent and processes > 0
    # only processes that live on use their blocks again; quads are joined in new memory
    dataset.memory = BatchMemory(processes) if dataset.augment and persistent and not quad else None
    dataset.finish_later = dataset.augment and finish_on is not None and not quad
    loader = DetectionLoader(
        dataset,
        batch_sampler=EpochBatches(sampler, batch_size, drop_last=quad, endless=persistent),
        num_workers=processes,
        collate_fn=collate_quad if quad else collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(_start_worker, patient),
        persistent_workers=persistent,
        generator=torch.Generator().manual_seed(seed),  # leaves the global generator alone
    )
    loader.finish_on = finish_on if dataset.finish_later else None
    return loader


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h


def _keep_freed_memory() -> None:
    """Ask glibc to reuse the memory of the last picture for the next. By default it returns blocks of this size to
    the system, and getting them back page by page costs a quarter of a loader's time."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # its upper limit
        libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)
    except (OSError, AttributeError, TypeError):  # another C library
        pass


def _told_by_the_program(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What sys.excepthook of a loader process does: in it, a thread hands tensors over, and a program that ends while
    it is taking one leaves it with a closed connection."""
    if not isinstance(error, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, traceback)


def _start_worker(patient: bool, _: int) -> None:
    """One core each: many processes with many threads only get in each other's way. And no end before its time."""
    if patient:
        outlive_first_sigterm()
    sys.excepthook = _told_by_the_program
    _keep_freed_memory()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
