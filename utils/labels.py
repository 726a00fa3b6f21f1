"""Label files: where they are, what a row means, and what is wrong with one, told by file and row.

A row is ``class cx cy w h`` or ``class x1 y1 x2 y2 x3 y3 ...`` (a polygon), numbers 0..1 of the image, blanks between.
"""

from __future__ import annotations

import math
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.boxes import xyxy_to_cxcywh
from utils.errors import DataError

MAX_BYTES, MAX_ROW = 16_000_000, 2_000_000
"""Bytes of a label file and characters of one row: many times what the finest polygons of a picture take."""
MAX_FAULTS = 1000
"""A file with more bad rows than this is no label file."""
_MANY_ROWS = 6  # below, arrays cost more than they save
MAX_CLASS = 1 << 24  # float32 counts up to here
TOLERANCE = 0.01
"""Coordinates this far outside 0..1 are rounding in somebody's converter: they are clipped, not refused."""


@dataclass
class LabelFile:
    """What one label file holds.

    ``boxes`` (n, 5) float32: class, cx, cy, w, h in 0..1. ``segments``: None, or one (k, 2) float32 array of x, y in
    0..1 for each box, empty for boxes that were not given as polygons. ``faults``: (row number, reason) of each row
    that was dropped. ``clipped`` and ``duplicates`` count rows that were mended.
    """

    boxes: np.ndarray
    segments: list[np.ndarray] | None = None
    faults: list[tuple[int, str]] = field(default_factory=list)
    clipped: int = 0
    duplicates: int = 0
    rows: int = 0


def label_path(image: str | Path) -> str:
    """Where the label of an image is: the last ``/images/`` becomes ``/labels/``, the suffix ``.txt``.

    A path without a folder ``images`` has its label beside it.
    """
    here, there = f"{os.sep}images{os.sep}", f"{os.sep}labels{os.sep}"
    stem = os.sep + os.path.splitext(str(image))[0]  # the added separator lets a relative images/a.jpg match as well
    return there.join(stem.rsplit(here, 1))[1:] + ".txt"


def read_labels(path: str | Path, nc: int | None = None) -> LabelFile:
    """Read a label file, dropping (and naming) the rows that cannot be meant.

    ``nc``: number of classes, to check the class numbers; None leaves them unbounded. Raises DataError when the file
    as a whole cannot be read.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise DataError(f"{path}: cannot be read (not a file)")
        if status.st_size > MAX_BYTES:
            raise DataError(f"{path}: larger than {MAX_BYTES // 1_000_000} MB, no label file")
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return decode_labels(data, path, nc)


def decode_labels(data: bytes, path: str | Path, nc: int | None = None) -> LabelFile:
    """:func:`read_labels` of the bytes of ``path``."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file in UTF-8; save it again as plain text") from None
    result = parse_labels(text, nc)
    if len(result.faults) > MAX_FAULTS:
        raise DataError(f"{path}: more than {MAX_FAULTS:,} bad rows, no label file; row 1: {result.faults[0][1]}")
    return result


def parse_labels(text: str, nc: int | None = None) -> LabelFile:
    """:func:`read_labels` of a text already in memory. Reading ends after MAX_FAULTS + 1 bad rows."""
    lines = text.splitlines()
    plain = _parse_plain(lines, nc) if len(lines) >= _MANY_ROWS else None
    if plain is not None:
        return plain
    boxes: list[tuple[float, ...]] = []
    segments: list[np.ndarray] = []
    result = LabelFile(np.zeros((0, 5), np.float32))
    seen: set[tuple[float, ...]] = set()
    for number, line in enumerate(lines, 1):
        if not line or line.isspace():
            continue
        result.rows += 1
        try:
            values, clipped = _read_row(line, nc)
        except ValueError as reason:
            result.faults.append((number, str(reason)))
            if len(result.faults) > MAX_FAULTS:
                break
            continue
        if values in seen:
            result.duplicates += 1
            continue
        seen.add(values)
        result.clipped += clipped
        points = np.array(values[1:], np.float32).reshape(-1, 2) if len(values) > 5 else np.zeros((0, 2), np.float32)
        segments.append(points)
        boxes.append((values[0], *_bounds(points)) if len(points) else values)
    if boxes:
        result.boxes = np.array(boxes, np.float32)
    if any(len(s) for s in segments):
        result.segments = segments
    return result


def _parse_plain(lines: list[str], nc: int | None) -> LabelFile | None:
    """A file of boxes in which nothing is wrong, all rows at once; None for any other: row by row tells what it is."""
    fields = [line.split() for line in lines]
    if any(len(row) != 5 for row in fields) or max(map(len, lines)) > MAX_ROW:
        return None
    try:
        rows = np.array([list(map(float, row)) for row in fields])
    except ValueError:
        return None
    classes, numbers, boxes = rows[:, 0], rows[:, 1:], rows.astype(np.float32)
    most = MAX_CLASS if nc is None else nc - 1
    good = (classes >= 0) & (classes <= most) & (classes == np.floor(classes))
    good &= ((numbers >= 0) & (numbers <= 1)).all(1) & (boxes[:, 3:] > 0).all(1)  # NaN fails every comparison
    if not good.all() or len(set(map(tuple, rows.tolist()))) < len(rows):
        return None
    return LabelFile(boxes, rows=len(rows))


def _bounds(points: np.ndarray) -> tuple[float, ...]:
    (x1, y1), (x2, y2) = points.min(0), points.max(0)
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1


def _read_row(line: str, nc: int | None) -> tuple[tuple[float, ...], bool]:
    """The numbers of one row and whether any was clipped. Raises ValueError with the reason."""
    if len(line) > MAX_ROW:
        raise ValueError(f"a row of {len(line):,} characters")
    fields = line.split()
    count = len(fields)
    polygon = count > 6
    if "," in fields[0] or count == 1:
        raise ValueError("numbers must be separated by blanks, one box a row: class cx cy w h")
    if not polygon and count != 5:
        hint = "; a file saved with confidences?" if count == 6 else ""
        raise ValueError(f"{count} columns, expected 5: class cx cy w h{hint}")
    if polygon and count % 2 == 0:
        raise ValueError(f"{count} columns: a polygon is a class and pairs x y")
    try:
        values = tuple(map(float, fields))
    except ValueError:
        wrong = next(f for f in fields if not _is_number(f))
        hint = "; write decimals with a point" if re.fullmatch(r"-?\d+,\d+", wrong) else ""
        raise ValueError(f"'{wrong[:40]}' is not a number{hint}") from None
    if not all(map(math.isfinite, values)):
        raise ValueError("NaN or infinite value")
    _check_class(values[0], nc)
    numbers = values[1:]
    low, high = min(numbers), max(numbers)
    if low < -TOLERANCE or (not polygon and min(numbers[2:]) < 0):
        raise ValueError(f"negative value {low:g}")
    if high > 1 + TOLERANCE:
        hint = "; are these pixels?" if high > 2 else ""
        raise ValueError(f"value {high:g} is outside 0..1{hint}")
    clipped = low < 0 or high > 1
    if clipped:
        numbers = tuple(min(max(n, 0.0), 1.0) for n in numbers)
    # as float32, in which they are kept: 1e-50 is no width
    sides = _bounds(np.array(numbers, np.float32).reshape(-1, 2)) if polygon else numbers
    if np.float32(sides[2]) <= 0 or np.float32(sides[3]) <= 0:
        raise ValueError("box without width or height")
    return (values[0], *numbers), clipped


def _check_class(value: float, nc: int | None) -> None:
    if value != int(value):
        raise ValueError(f"class {value:g} is not a whole number")
    if value < 0:
        raise ValueError(f"class {value:g} is negative")
    if value > MAX_CLASS:
        raise ValueError(f"class {value:g} is too large")
    if nc is not None and value >= nc:
        names = "1 name (0)" if nc == 1 else f"{nc} names (0..{nc - 1})"
        raise ValueError(f"class {value:g} but the data set has {names}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def format_detections(
    detections: np.ndarray, size: tuple[int, int], with_confidence: bool = False, corners: bool = False
) -> str:
    """(n, 6) x1, y1, x2, y2 in pixels of an image of ``size`` (height, width), confidence, class -> the text of a
    label file: ``class cx cy w h [confidence]`` a row, in 0..1, in the order given. ``corners`` writes x1 y1 x2 y2
    instead of centre and size."""
    rows = np.asarray(detections, np.float64)
    boxes = rows[:, :4] if corners else xyxy_to_cxcywh(rows[:, :4])
    boxes = boxes / np.array([size[1], size[0], size[1], size[0]])
    lines = []
    for box, (conf, cls) in zip(boxes.tolist(), rows[:, 4:].tolist()):
        values = [int(cls), *box, conf] if with_confidence else [int(cls), *box]
        lines.append(" ".join(f"{value:g}" for value in values) + "\n")
    return "".join(lines)
