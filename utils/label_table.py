"""All that a scan of a data set knows, in flat arrays: a million images are a few hundred megabytes and no objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.label_index import Fault, PackedStrings, gather, offsets_of

OK, MISSING, EMPTY, CORRUPT = range(4)

STALE = (-2, -2, -2, -2)
"""The stamp of an image that must be read again whatever its files look like."""


@dataclass
class LabelTable:
    """The scanned images, usable or not.

    ``paths`` (n); ``stamps`` (n, 4) int64: size and mtime_ns of the image and of its label file (-1: none);
    ``status`` (n,) uint8: OK, MISSING, EMPTY or CORRUPT; ``counts`` (n, 3) int32: rows, clipped rows, duplicate rows of
    the label file; ``faults``: by image number. ``sizes``, ``labels``, ``offsets``, ``points`` and ``point_offsets`` as
    in :class:`utils.label_index.LabelIndex`.
    """

    paths: PackedStrings
    stamps: np.ndarray
    status: np.ndarray
    counts: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    points: np.ndarray
    point_offsets: np.ndarray
    faults: dict[int, list[Fault]]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, order: np.ndarray) -> LabelTable:
        """The table with image ``order[i]`` in place i."""
        if len(order) == len(self) and (order == np.arange(len(self))).all():
            return self
        labels, offsets = gather(self.labels, self.offsets, order)
        points, _ = gather(self.points, self.point_offsets[self.offsets], order)
        corners, _ = gather(np.diff(self.point_offsets), self.offsets, order)
        faulty = np.flatnonzero(np.isin(order, list(self.faults)))
        return LabelTable(
            self.paths.take(order),
            self.stamps[order],
            self.status[order],
            self.counts[order],
            self.sizes[order],
            labels,
            offsets,
            points,
            offsets_of(corners),
            {place: self.faults[int(order[place])] for place in faulty.tolist()},
        )


def join_tables(tables: Sequence[LabelTable]) -> LabelTable:
    """One table after the other."""
    if len(tables) == 1:
        return tables[0]
    faults: dict[int, list[Fault]] = {}
    first = 0
    for table in tables:
        faults |= {first + number: found for number, found in table.faults.items()}
        first += len(table)
    joined = {field.name: [getattr(t, field.name) for t in tables] for field in dataclasses.fields(LabelTable)}
    columns = ("stamps", "status", "counts", "sizes", "labels", "points")
    return LabelTable(
        paths=PackedStrings.join(joined["paths"]),
        offsets=_join_offsets(joined["offsets"]),
        point_offsets=_join_offsets(joined["point_offsets"]),
        faults=faults,
        **{name: np.concatenate(joined[name]) for name in columns},
    )


def _join_offsets(parts: Sequence[np.ndarray]) -> np.ndarray:
    return offsets_of(np.concatenate([np.diff(part) for part in parts]))


def places_of(paths: Sequence[str], table: LabelTable) -> np.ndarray:
    """(n,) int64: where in the table each path is, -1 for those that are not in it. Both are sorted as text (what is
    out of order is not found)."""
    if table.paths.equals(paths):
        return np.arange(len(table))
    places = np.full(len(paths), -1, np.int64)
    number, count = 0, len(table)
    known = table.paths[0] if count else ""
    for place, path in enumerate(paths):
        while number < count and known < path:
            number += 1
            known = table.paths[number] if number < count else ""
        if number < count and known == path:
            places[place] = number
    return places
