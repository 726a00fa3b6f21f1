"""Scan a data set: read and check all labels once, and keep them beside the labels in a ``.cache.npz`` file.

The cache holds numbers and text only (no pickle). It remembers size and modification time of every image and label
file; whatever has changed is read again, the rest is not. A damaged or foreign cache is rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from utils.console import LOGGER, progress
from utils.cores import available_cores
from utils.errors import DataError
from utils.files import atomic_open, remove_leftovers
from utils.images import MAX_PIXELS, check_image, list_images
from utils.label_index import EMPTY_POINTS, Fault, LabelIndex, PackedStrings, offsets_of
from utils.label_table import CORRUPT, EMPTY, MISSING, OK, STALE, LabelTable, join_tables, places_of
from utils.labels import MAX_CLASS, LabelFile, label_path, read_labels
from utils.npz import NPZ_DAMAGE, check_offsets, read_npz

VERSION = 3  # 3: status and counts as arrays
DAY = 86_400.0
SETTLED_NS = 2_000_000_000
"""A file changed less than this before a scan is read again next time: file systems keep times this coarsely."""

_TASK = 50  # images that a thread reads before it asks for more
_CHUNK = 20_000  # images read at a time: as objects they take a kilobyte each
MAX_SHOWN = 10
_KINDS = {
    "path_bytes": (np.uint8, None),
    "path_offsets": (np.int64, None),
    "sizes": (np.int32, 2),
    "labels": (np.float32, 5),
    "offsets": (np.int64, None),
    "points": (np.float32, 2),
    "point_offsets": (np.int64, None),
    "stamps": (np.int64, 4),
    "status": (np.uint8, None),
    "counts": (np.int32, 3),
    "meta": (np.uint8, None),
}


@dataclass
class Entry:
    """One image with its labels, as scanned. ``stamp``: size and mtime_ns of the image and of the label (-1: none)."""

    path: str
    stamp: tuple[int, int, int, int]
    size: tuple[int, int]
    status: int
    labels: LabelFile
    faults: list[Fault]


def scan_labels(
    sources: str | Path | Iterable[str | Path],
    nc: int | None = None,
    prefix: str = "",
    strict: bool = False,
    require_labels: bool = False,
    show: bool = True,
) -> LabelIndex:
    """Find the images of ``sources``, read and check their labels (through the cache) and log what is wrong.

    ``nc``: number of classes, None not to check. ``strict`` turns the first fault into an error. ``require_labels``:
    a set without a single box is an error (training); otherwise a warning. ``show``: progress bar and log lines.
    Raises DataError when there are no images, no labels where there must be, or by ``strict``.
    """
    sources = [Path(s) for s in ([sources] if isinstance(sources, (str, Path)) else sources)]
    images = list_images(sources)
    if not images:
        listed = ", ".join(map(str, sources))
        raise DataError(f"{prefix and prefix + ': '}no images found in {listed} (.jpg, .png, .bmp, .tif, .webp, ...)")
    where = _set_name(sources, images)
    prefix = f"{prefix}: " if prefix else ""
    caches = [Path(where + ".cache.npz"), user_cache_dir() / "labels" / f"{_digest(where)}.cache.npz"]
    started = time.time_ns()
    known, cache = _read_first(caches, nc)
    title = f"{prefix}Scanning {cache or where + '...'}"
    table, fresh = _scan(images, nc, known, title, show)
    if fresh or known is None or len(known) != len(images):
        _write_first(caches, table, nc, started)
    del images, known
    index = _build(table, where)
    if show:
        LOGGER.info(f"{title} {index.summary()}")
        _show_faults(index.faults, prefix)
    if strict and index.faults:
        count = len(index.faults)
        raise DataError(f"{prefix}{count} faults in the data set (--strict-data); the first: {index.faults[0]}")
    _check_any(index, table, prefix, require_labels)
    return index


def user_cache_dir() -> Path:
    """Where caches go that cannot lie beside the data: ``$XDG_CACHE_HOME/dcn-yolov5`` or ``~/.cache/dcn-yolov5``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "dcn-yolov5"


def _set_name(sources: list[Path], images: list[str]) -> str:
    """The list's name or the labels folder, without suffix; several sources get a tail so that sets do not collide."""
    first = sources[0]
    name = str(first.with_suffix("")) if first.is_file() else os.path.dirname(label_path(images[0]))
    if first.is_dir():  # nested folders share one cache, named after the source itself
        name = label_path(first / "x").removesuffix(f"{os.sep}x.txt")
    return name if len(sources) == 1 else f"{name}-{_digest('|'.join(map(str, sources)))[:8]}"


def _digest(text: str) -> str:
    return hashlib.sha256(os.path.abspath(text).encode(errors="surrogateescape")).hexdigest()[:24]


def _scan(
    images: list[str], nc: int | None, known: LabelTable | None, title: str, show: bool
) -> tuple[LabelTable, int]:
    """The table of all images in order, unchanged ones taken from ``known``, and how many were read."""
    places = np.full(len(images), -1, np.int64)
    if known is not None and len(known):
        places = places_of(images, known)
        places[(_stamps(images) != known.stamps[places]).any(1)] = -1
    todo = np.flatnonzero(places < 0)
    if not len(todo):
        return known.take(places), 0
    tables = [known] if known is not None else []
    reused = sum(map(len, tables))
    read = _read_entries(images, todo, nc)
    read = iter(progress(read, total=len(todo), desc=title, enabled=show and len(todo) > 500))
    while entries := list(islice(read, _CHUNK)):
        tables.append(_pack(entries))
    places[todo] = np.arange(reused, reused + len(todo))
    return join_tables(tables).take(places), len(todo)


def _read_entries(images: list[str], todo: np.ndarray, nc: int | None) -> Iterator[Entry]:
    """:func:`read_entry` of the images of these numbers, in order, by several threads: they wait for the disk."""
    with ThreadPoolExecutor(min(8, available_cores())) as pool:
        for first in range(0, len(todo), _CHUNK):
            chunk = todo[first : first + _CHUNK]
            parts = [chunk[at : at + _TASK] for at in range(0, len(chunk), _TASK)]
            for entries in pool.map(lambda part: [read_entry(images[i], nc) for i in part], parts):
                yield from entries


def _stamps(images: list[str]) -> np.ndarray:
    """(n, 4) int64: size and mtime_ns of each image and of its label file, -1 where there is none."""
    stamps = array("q")
    folder, label_folder = None, ""
    for path in images:
        here, _, name = path.rpartition(os.sep)
        if here != folder:  # the same for thousands of images
            folder, label_folder = here, os.path.join(os.path.dirname(label_path(path)), "")
        stamps.extend(_file_stamp(path))
        stamps.extend(_file_stamp(f"{label_folder}{os.path.splitext(name)[0]}.txt"))
    return np.frombuffer(stamps, np.int64).reshape(-1, 4)


def _stamp(path: str) -> tuple[int, int, int, int]:
    return *_file_stamp(path), *_file_stamp(label_path(path))


def _file_stamp(file: str) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def read_entry(path: str, nc: int | None) -> Entry:
    """Scan one image and its label file. A fault of the image, or of every row, makes the entry CORRUPT."""
    entry = Entry(path, _stamp(path), (0, 0), OK, LabelFile(np.zeros((0, 5), np.float32)), [])
    label = label_path(path)
    try:
        if entry.stamp[2] >= 0 or os.path.islink(label):  # a link to nowhere is a fault, not a background
            entry.labels = read_labels(label, nc)
            entry.faults = [Fault(label, row, reason) for row, reason in entry.labels.faults]
        entry.size = check_image(path)
    except DataError as error:
        place = label if str(error).startswith(label) else path
        entry.faults.append(Fault(place, 0, str(error)))
        entry.status = CORRUPT
        return entry
    if entry.stamp[2] < 0:
        entry.status = MISSING
    elif not entry.labels.rows:
        entry.status = EMPTY
    elif not len(entry.labels.boxes):  # objects are there, but where is unknown: not a background to learn from
        entry.faults.append(Fault(label, 0, f"none of its {entry.labels.rows} rows can be used, the image is left out"))
        entry.status = CORRUPT
    return entry


def _pack(entries: list[Entry]) -> LabelTable:
    segments = [s for e in entries for s in (e.labels.segments or [EMPTY_POINTS] * len(e.labels.boxes))]
    files = [e.labels for e in entries]
    return LabelTable(
        paths=PackedStrings([e.path for e in entries]),
        stamps=np.array([e.stamp for e in entries], np.int64).reshape(-1, 4),
        status=np.array([e.status for e in entries], np.uint8),
        counts=np.array([(f.rows, f.clipped, f.duplicates) for f in files], np.int32).reshape(-1, 3),
        sizes=np.array([e.size for e in entries], np.int32).reshape(-1, 2),
        labels=np.concatenate([f.boxes for f in files] or [np.zeros((0, 5), np.float32)]),
        offsets=offsets_of(len(f.boxes) for f in files),
        points=np.concatenate(segments or [EMPTY_POINTS]),
        point_offsets=offsets_of(len(s) for s in segments),
        faults={number: e.faults for number, e in enumerate(entries) if e.faults},
    )


def _build(table: LabelTable, where: str) -> LabelIndex:
    usable = table.take(np.flatnonzero(table.status != CORRUPT))
    count = np.bincount(table.status, minlength=4).tolist()
    _, clipped, duplicates = usable.counts.sum(0, dtype=np.int64).tolist()
    return LabelIndex(
        usable.paths,
        usable.sizes,
        usable.labels,
        usable.offsets,
        usable.points,
        usable.point_offsets,
        faults=[fault for number in sorted(table.faults) for fault in table.faults[number]],
        found=int((table.stamps[:, 2] >= 0).sum()),
        missing=count[MISSING],
        empty=count[EMPTY],
        corrupt=count[CORRUPT],
        clipped=clipped,
        duplicates=duplicates,
        where=where,
    )


def _write_first(caches: list[Path], table: LabelTable, nc: int | None, started_ns: int) -> None:
    """Write the cache beside the labels, else in the user's cache folder; else say that there is none."""
    arrays = {name: getattr(table, name) for name in _KINDS if hasattr(table, name)}
    arrays |= {"path_bytes": table.paths.bytes, "path_offsets": table.paths.offsets}
    faults = [[number, f.path, f.row, f.reason] for number, found in table.faults.items() for f in found]
    meta = {"version": VERSION, "nc": nc, "started_ns": started_ns, "faults": faults}
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    reason = ""
    for cache in caches:
        try:
            if cache is caches[-1]:
                cache.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(cache.parent, of=f"{cache.name}.", older_than=DAY)
            with atomic_open(cache) as file:
                np.savez(file, **arrays)
            LOGGER.info(f"New cache created: {cache}")
            return
        except OSError as error:
            reason = f"{cache}: {error.strerror}"
    LOGGER.warning(f"labels are not cached ({reason}); the next start scans them again")


def _read_first(caches: list[Path], nc: int | None) -> tuple[LabelTable | None, Path | None]:
    for cache in caches:
        if cache.is_file():
            try:
                return read_cache(cache, nc), cache
            except NPZ_DAMAGE as error:
                LOGGER.warning(f"{cache}: damaged or of another version ({error}); scanning again")
    return None, None


def read_cache(cache: Path, nc: int | None) -> LabelTable | None:
    """The table of an earlier scan, None when it was made for another number of classes. Images whose files changed
    just before that scan have the stamp STALE: they may have changed again since, within the clock's tick."""
    arrays = read_npz(cache, _KINDS)
    meta = json.loads(arrays.pop("meta").tobytes())
    if meta["version"] != VERSION:
        raise ValueError(f"version {meta['version']}, expected {VERSION}")
    if meta["nc"] != nc:  # every class number must be checked again
        return None
    _check_cache(arrays, nc)
    paths = PackedStrings.from_arrays(arrays.pop("path_bytes"), arrays.pop("path_offsets"))
    table = LabelTable(paths, faults=_read_faults(meta["faults"], len(paths)), **arrays)
    newest = meta["started_ns"] - SETTLED_NS
    table.stamps[np.maximum(table.stamps[:, 1], table.stamps[:, 3]) > newest] = STALE
    return table


def _read_faults(rows: list, count: int) -> dict[int, list[Fault]]:
    """Raises ValueError unless they are what :func:`_write_first` writes."""
    faults: dict[int, list[Fault]] = {}
    for row in rows:
        if [type(part) for part in row] != [int, str, int, str] or not 0 <= row[0] < count:
            raise ValueError("faults of another kind")
        faults.setdefault(row[0], []).append(Fault(*row[1:]))
    return faults


def _check_cache(arrays: dict[str, np.ndarray], nc: int | None) -> None:
    """Raise ValueError unless a cache holds what a scan could have written: data sets come with caches in them."""
    count, labels, sizes = len(arrays["stamps"]), arrays["labels"], arrays["sizes"]
    if not count == len(sizes) == len(arrays["status"]) == len(arrays["counts"]):
        raise ValueError("lengths disagree")
    check_offsets(arrays["path_offsets"], count, len(arrays["path_bytes"]))
    check_offsets(arrays["offsets"], count, len(labels))
    check_offsets(arrays["point_offsets"], len(labels), len(arrays["points"]))
    classes, most = labels[:, 0], MAX_CLASS if nc is None else nc - 1
    is_class = (classes >= 0) & (classes <= most) & (classes == classes.round())
    units = [labels[:, 1:], arrays["points"]]
    if not (is_class.all() and all(((u >= 0) & (u <= 1)).all() for u in units) and (labels[:, 3:] > 0).all()):
        raise ValueError("labels out of range")
    if (sizes < 0).any() or (sizes.astype(np.int64).prod(1) > MAX_PIXELS).any():
        raise ValueError("sizes out of range")
    if (arrays["status"] > CORRUPT).any() or (arrays["counts"] < 0).any():
        raise ValueError("notes of another kind")


def _show_faults(faults: list[Fault], prefix: str) -> None:
    for fault in faults[:MAX_SHOWN]:
        LOGGER.warning(f"{prefix}{fault}")
    if len(faults) > MAX_SHOWN:
        LOGGER.warning(f"{prefix}and {len(faults) - MAX_SHOWN} more (train.py --check-data lists them all)")


def _check_any(index: LabelIndex, table: LabelTable, prefix: str, required: bool) -> None:
    """Say where labels were looked for when there are none."""
    if not len(index):
        raise DataError(f"{prefix}none of the {len(table)} images can be used; the first: {index.faults[0]}")
    if len(index.labels):
        return
    if not index.missing:
        message = f"{prefix}all {index.empty} label files in {index.where} are empty"
    else:
        bare = table.paths[int((table.status == MISSING).argmax())]
        label = label_path(bare)
        reason = f"the folder {os.path.dirname(label)} does not exist"
        if os.path.isdir(os.path.dirname(label)):
            reason = f"{os.path.dirname(label)} has no file of that name"
        if f"{os.sep}images{os.sep}" not in bare:
            reason += "; no folder of the path is called 'images', so labels must lie beside the images"
        else:
            reason += "; labels lie where the last 'images' of the path reads 'labels'"
        message = f"{prefix}no labels found: {bare} should have {label}, but {reason}"
    if required:
        raise DataError(f"{message}; there is nothing to train on")
    LOGGER.warning(message)
