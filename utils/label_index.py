"""The labels of a whole data set in a few flat arrays: no object per image, so forked processes share the memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

EMPTY_POINTS = np.zeros((0, 2), np.float32)
"""The polygon of a plain box."""


class PackedStrings:
    """A read-only list of texts in two arrays: forked loader processes share it without copying its pages."""

    def __init__(self, texts: Sequence[str]) -> None:
        encoded = [os.fsencode(t) for t in texts]
        self.bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self.offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    @classmethod
    def from_arrays(cls, data: np.ndarray, offsets: np.ndarray) -> PackedStrings:
        """The inverse of reading ``bytes`` and ``offsets``."""
        packed = cls([])
        packed.bytes, packed.offsets = data, offsets
        return packed

    def __len__(self) -> int:
        return len(self.offsets) - 1

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
        rows = np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in order] or [[]]).astype(np.int64)
        polygons = [self.points[self.point_offsets[r] : self.point_offsets[r + 1]] for r in rows]
        counts = np.diff(self.offsets)[order]
        return LabelIndex(
            PackedStrings([self.paths[i] for i in order]),
            self.sizes[order],
            self.labels[rows],
            offsets_of(counts),
            np.concatenate(polygons or [EMPTY_POINTS]),
            offsets_of([len(p) for p in polygons]),
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


def offsets_of(counts: Iterable[int]) -> np.ndarray:
    """(n,) counts -> (n + 1,) int64 running sums from 0."""
    return np.concatenate(([0], np.cumsum(np.fromiter(counts, np.int64)))).astype(np.int64)
