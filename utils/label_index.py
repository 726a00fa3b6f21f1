"""The labels of a whole data set in a few flat arrays: no object per image, so forked processes share the memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_GATHERED = 50_000  # groups and texts handled at a time, where that takes memory

EMPTY_POINTS = np.zeros((0, 2), np.float32)
"""The polygon of a plain box."""


class PackedStrings:
    """A read-only list of texts in two arrays: forked loader processes share it without copying its pages."""

    def __init__(self, texts: Sequence[str]) -> None:
        joined = "".join(texts)
        if joined.isascii():
            self.bytes, lengths = np.frombuffer(joined.encode("ascii"), np.uint8), map(len, texts)
        else:
            encoded = [os.fsencode(text) for text in texts]
            self.bytes, lengths = np.frombuffer(b"".join(encoded), np.uint8), map(len, encoded)
        self.offsets = offsets_of(lengths)

    @classmethod
    def from_arrays(cls, data: np.ndarray, offsets: np.ndarray) -> PackedStrings:
        """The inverse of reading ``bytes`` and ``offsets``."""
        packed = cls([])
        packed.bytes, packed.offsets = data, offsets
        return packed

    @classmethod
    def join(cls, parts: Sequence[PackedStrings]) -> PackedStrings:
        """One list after the other."""
        offsets = offsets_of(np.concatenate([np.diff(part.offsets) for part in parts]))
        return cls.from_arrays(np.concatenate([part.bytes for part in parts]), offsets)

    def take(self, order: np.ndarray) -> PackedStrings:
        """The list with text ``order[i]`` in place i."""
        return self.from_arrays(*gather(self.bytes, self.offsets, order))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def equals(self, texts: Sequence[str]) -> bool:
        """Whether these are the same texts."""
        if len(texts) != len(self):
            return False
        for first in range(0, len(texts), _GATHERED):
            part = PackedStrings(texts[first : first + _GATHERED])
            own = self.offsets[first : first + _GATHERED + 1]
            if not np.array_equal(part.offsets, own - own[0]):
                return False
            if not np.array_equal(part.bytes, self.bytes[own[0] : own[-1]]):
                return False
        return True

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return os.fsdecode(self.bytes[self.offsets[index] : self.offsets[index + 1]].tobytes())


@dataclass
class Fault:
    """Something wrong with an image or with a row of its label file (``row`` 0: the file as a whole)."""

    path: str
    row: int
    reason: str

    def __str__(self) -> str:
        if not self.row:
            return self.reason if self.reason.startswith(self.path) else f"{self.path}: {self.reason}"
        return f"{self.path}:{self.row}: {self.reason}"


@dataclass
class LabelIndex:
    """The labels of a data set.

    ``paths``: the n usable images. ``sizes`` (n, 2) int32: width, height as shown. ``labels`` (rows, 5) float32:
    class, cx, cy, w, h in 0..1. ``offsets`` (n + 1): image i has rows offsets[i]:offsets[i+1]. ``points`` (P, 2)
    float32 and ``point_offsets`` (rows + 1): the polygon of each row, empty for plain boxes. ``faults`` of the whole
    scan, also of images left out; ``found``, ``missing``, ``empty``, ``corrupt``: counts of images; ``where``: the
    folder or list that names this set in messages.
    """

    paths: PackedStrings
    sizes: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    points: np.ndarray
    point_offsets: np.ndarray
    faults: list[Fault]
    found: int = 0
    missing: int = 0
    empty: int = 0
    corrupt: int = 0
    clipped: int = 0
    duplicates: int = 0
    where: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def rows(self, index: int) -> np.ndarray:
        """(n, 5) labels of image ``index`` (a view)."""
        return self.labels[self.offsets[index] : self.offsets[index + 1]]

    def segments(self, index: int) -> list[np.ndarray] | None:
        """One (k, 2) polygon for each label of image ``index``, or None when it has plain boxes only."""
        first, last = self.offsets[index], self.offsets[index + 1]
        bounds = self.point_offsets[first : last + 1]
        if not len(bounds) or bounds[0] == bounds[-1]:
            return None
        return [self.points[a:b] for a, b in zip(bounds[:-1], bounds[1:])]

    def reorder(self, order: np.ndarray) -> LabelIndex:
        """The same set with image ``order[i]`` in place i."""
        labels, offsets = gather(self.labels, self.offsets, order)
        points, _ = gather(self.points, self.point_offsets[self.offsets], order)
        corners, _ = gather(np.diff(self.point_offsets), self.offsets, order)
        return LabelIndex(
            self.paths.take(order),
            self.sizes[order],
            labels,
            offsets,
            points,
            offsets_of(corners),
            self.faults,
            *(self.found, self.missing, self.empty, self.corrupt, self.clipped, self.duplicates, self.where),
        )

    def summary(self) -> str:
        """``205 images, 2 backgrounds, 5 corrupt`` and what was mended or dropped inside files."""
        parts = [f"{self.found} images", f"{self.missing + self.empty} backgrounds", f"{self.corrupt} corrupt"]
        dropped = sum(fault.row > 0 for fault in self.faults)
        extra = [(dropped, "bad rows dropped"), (self.clipped, "rows clipped")]
        extra.append((self.duplicates, "duplicate rows removed"))
        return ", ".join(parts + [f"{count} {what}" for count, what in extra if count])


def offsets_of(counts: Iterable[int] | np.ndarray) -> np.ndarray:
    """(n,) counts -> (n + 1,) int64 running sums from 0."""
    counts = counts if isinstance(counts, np.ndarray) else np.fromiter(counts, np.int64)
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def gather(values: np.ndarray, offsets: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups of rows in another order: group i is values[offsets[i]:offsets[i+1]], the result has group ``order[i]`` in
    place i. Returns the rows and their offsets."""
    counts = np.diff(offsets)[order]
    out_offsets = offsets_of(counts)
    out = np.empty((int(out_offsets[-1]), *values.shape[1:]), values.dtype)
    if len(out) == 0:
        return out, out_offsets
    runs = np.flatnonzero(np.diff(order, prepend=order[0] - 2) != 1)  # where groups stop following each other
    if len(runs) < len(order) // 8:
        for first, last in zip(runs.tolist(), [*runs[1:].tolist(), len(order)]):
            source = values[offsets[order[first]] : offsets[order[last - 1] + 1]]
            out[out_offsets[first] : out_offsets[last]] = source
        return out, out_offsets
    for first in range(0, len(order), _GATHERED):
        part = order[first : first + _GATHERED]
        start, end = out_offsets[first], out_offsets[first + len(part)]
        shift = offsets[part] - (out_offsets[first : first + len(part)] - start)
        out[start:end] = values[np.repeat(shift, counts[first : first + len(part)]) + np.arange(end - start)]
    return out, out_offsets
