"""Scan a data set: read and check all labels once, and keep them beside the labels in a ``.cache.npz`` file.

The cache holds numbers and text only (no pickle). It remembers size and modification time of every image and label
file; whatever has changed is read again, the rest is not. A damaged or foreign cache is rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.console import LOGGER, progress
from utils.errors import DataError
from utils.files import atomic_open, remove_leftovers
from utils.images import MAX_PIXELS, check_image, list_images
from utils.label_index import EMPTY_POINTS, Fault, LabelIndex, PackedStrings, offsets_of
from utils.labels import MAX_CLASS, LabelFile, label_path, read_labels
from utils.npz import NPZ_DAMAGE, check_offsets, read_npz

VERSION = 2  # 2: PNG chunks, links to nowhere
DAY = 86_400.0
SETTLED_NS = 2_000_000_000
"""A file changed less than this before a scan is read again next time: file systems keep times this coarsely."""

OK, MISSING, EMPTY, CORRUPT = range(4)
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
    entries, fresh = _scan(images, nc, known, title, show)
    if fresh or len(known) != len(images):
        _write_first(caches, entries, nc, started)
    index = _build(entries, where)
    if show:
        LOGGER.info(f"{title} {index.summary()}")
        _show_faults(index.faults, prefix)
    if strict and index.faults:
        count = len(index.faults)
        raise DataError(f"{prefix}{count} faults in the data set (--strict-data); the first: {index.faults[0]}")
    _check_any(index, entries, prefix, require_labels)
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
    images: list[str], nc: int | None, known: dict[str, Entry], title: str, show: bool
) -> tuple[list[Entry], int]:
    """Entries of all images in order, unchanged ones taken from ``known``, and how many were read."""
    reused: dict[str, Entry] = {}
    for path in images:
        entry = known.get(path)
        if entry is not None and entry.stamp == _stamp(path):
            reused[path] = entry
    todo = [path for path in images if path not in reused]
    if todo:
        workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:
            results = pool.map(lambda path: read_entry(path, nc), todo)
            for entry in progress(results, total=len(todo), desc=title, enabled=show and len(todo) > 500):
                reused[entry.path] = entry
    return [reused[path] for path in images], len(todo)


def _stamp(path: str) -> tuple[int, int, int, int]:
    stamp: list[int] = []
    for file in (path, label_path(path)):
        try:
            status = os.stat(file)
            stamp += [status.st_size, status.st_mtime_ns]
        except OSError:
            stamp += [-1, -1]
    return tuple(stamp)


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


def _pack(entries: list[Entry]) -> dict[str, np.ndarray]:
    segments = [s for e in entries for s in (e.labels.segments or [EMPTY_POINTS] * len(e.labels.boxes))]
    paths = PackedStrings([e.path for e in entries])
    return {
        "path_bytes": paths.bytes,
        "path_offsets": paths.offsets,
        "sizes": np.array([e.size for e in entries], np.int32).reshape(-1, 2),
        "labels": np.concatenate([e.labels.boxes for e in entries] or [np.zeros((0, 5), np.float32)]),
        "offsets": offsets_of(len(e.labels.boxes) for e in entries),
        "points": np.concatenate(segments or [EMPTY_POINTS]),
        "point_offsets": offsets_of(len(s) for s in segments),
    }


def _build(entries: list[Entry], where: str) -> LabelIndex:
    usable = [e for e in entries if e.status != CORRUPT]
    packed = _pack(usable)
    paths = PackedStrings.from_arrays(packed.pop("path_bytes"), packed.pop("path_offsets"))
    count = [e.status for e in entries].count
    return LabelIndex(
        paths,
        **packed,
        faults=[fault for e in entries for fault in e.faults],
        found=sum(e.stamp[2] >= 0 for e in entries),
        missing=count(MISSING),
        empty=count(EMPTY),
        corrupt=count(CORRUPT),
        clipped=sum(e.labels.clipped for e in usable),
        duplicates=sum(e.labels.duplicates for e in usable),
        where=where,
    )


def _write_first(caches: list[Path], entries: list[Entry], nc: int | None, started_ns: int) -> None:
    """Write the cache beside the labels, else in the user's cache folder; else say that there is none."""
    arrays = _pack(entries)
    arrays["stamps"] = np.array([e.stamp for e in entries], np.int64)
    notes = [
        [e.status, e.labels.rows, e.labels.clipped, e.labels.duplicates, [[f.path, f.row, f.reason] for f in e.faults]]
        for e in entries
    ]
    meta = {"version": VERSION, "nc": nc, "started_ns": started_ns, "notes": notes}
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


def _read_first(caches: list[Path], nc: int | None) -> tuple[dict[str, Entry], Path | None]:
    for cache in caches:
        if cache.is_file():
            try:
                return read_cache(cache, nc), cache
            except NPZ_DAMAGE as error:
                LOGGER.warning(f"{cache}: damaged or of another version ({error}); scanning again")
    return {}, None


def read_cache(cache: Path, nc: int | None) -> dict[str, Entry]:
    """Entries by path that may be trusted: not those whose files changed just before the scan."""
    arrays = read_npz(cache, _KINDS)
    meta = json.loads(arrays["meta"].tobytes())
    if meta["version"] != VERSION:
        raise ValueError(f"version {meta['version']}, expected {VERSION}")
    if meta["nc"] != nc:  # another number of classes: every class number must be checked again
        return {}
    _check_cache(arrays, meta["notes"], nc)
    paths = PackedStrings.from_arrays(arrays["path_bytes"], arrays["path_offsets"])
    newest = meta["started_ns"] - SETTLED_NS
    entries = {}
    for i, (status, rows, clipped, duplicates, faults) in enumerate(meta["notes"]):
        stamp = tuple(arrays["stamps"][i].tolist())
        if max(stamp[1], stamp[3]) > newest:
            continue
        first, last = arrays["offsets"][i], arrays["offsets"][i + 1]
        bounds = arrays["point_offsets"][first : last + 1]
        segments = [arrays["points"][a:b] for a, b in zip(bounds[:-1], bounds[1:])]
        labels = LabelFile(arrays["labels"][first:last], segments if any(map(len, segments)) else None)
        labels.rows, labels.clipped, labels.duplicates = rows, clipped, duplicates
        size = tuple(arrays["sizes"][i].tolist())
        entries[paths[i]] = Entry(paths[i], stamp, size, status, labels, [Fault(*f) for f in faults])
    return entries


def _check_cache(arrays: dict[str, np.ndarray], notes: list, nc: int | None) -> None:
    """Raise ValueError unless a cache holds what a scan could have written: data sets come with caches in them."""
    count, labels, sizes = len(notes), arrays["labels"], arrays["sizes"]
    if not count == len(arrays["stamps"]) == len(sizes):
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
    for status, *numbers, faults in notes:
        if status not in (OK, MISSING, EMPTY, CORRUPT) or [type(n) for n in numbers] != [int] * 3:
            raise ValueError("notes of another kind")
        if any([type(part) for part in fault] != [str, int, str] for fault in faults):
            raise ValueError("faults of another kind")


def _show_faults(faults: list[Fault], prefix: str) -> None:
    for fault in faults[:MAX_SHOWN]:
        LOGGER.warning(f"{prefix}{fault}")
    if len(faults) > MAX_SHOWN:
        LOGGER.warning(f"{prefix}and {len(faults) - MAX_SHOWN} more (train.py --check-data lists them all)")


def _check_any(index: LabelIndex, entries: list[Entry], prefix: str, required: bool) -> None:
    """Say where labels were looked for when there are none."""
    if not len(index):
        raise DataError(f"{prefix}none of the {len(entries)} images can be used; the first: {index.faults[0]}")
    if len(index.labels):
        return
    bare = next((e for e in entries if e.status == MISSING), None)
    if bare is None:
        message = f"{prefix}all {index.empty} label files in {index.where} are empty"
    else:
        label = label_path(bare.path)
        reason = f"the folder {os.path.dirname(label)} does not exist"
        if os.path.isdir(os.path.dirname(label)):
            reason = f"{os.path.dirname(label)} has no file of that name"
        if f"{os.sep}images{os.sep}" not in bare.path:
            reason += "; no folder of the path is called 'images', so labels must lie beside the images"
        else:
            reason += "; labels lie where the last 'images' of the path reads 'labels'"
        message = f"{prefix}no labels found: {bare.path} should have {label}, but {reason}"
    if required:
        raise DataError(f"{message}; there is nothing to train on")
    LOGGER.warning(message)
