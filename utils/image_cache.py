"""Images kept decoded and resized for the next epochs: in memory, or as raw files in the user's cache folder.

Nothing is ever written into the data set.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from utils.console import LOGGER, progress
from utils.errors import ConfigError
from utils.files import atomic_open
from utils.label_cache import user_cache_dir

GB = 1 << 30
_SPARE = 1.1  # decoded images are not all that a training needs


class NoCache:
    """Keeps nothing."""

    def get(self, index: int) -> np.ndarray | None:
        """The (h, w, 3) uint8 image ``index``, or None when it is not kept."""
        return None


class RamCache(NoCache):
    """All images in one block of memory: loader processes share it, and one allocation cannot fragment."""

    def __init__(self, shapes: np.ndarray) -> None:
        """``shapes`` (n, 2): height and width of each image."""
        self.shapes = shapes
        self.offsets = np.concatenate(([0], np.cumsum(shapes.astype(np.int64).prod(1) * 3)))
        self.pool = np.empty(self.offsets[-1], np.uint8)
        self.filled = np.zeros(len(shapes), bool)

    def get(self, index: int) -> np.ndarray | None:
        """The (h, w, 3) uint8 image ``index`` (not to be changed), or None before it is put."""
        if not self.filled[index]:
            return None
        block = self.pool[self.offsets[index] : self.offsets[index + 1]]
        return block.reshape(*self.shapes[index], 3)

    def put(self, index: int, image: np.ndarray) -> None:
        """Keep image ``index``."""
        self.pool[self.offsets[index] : self.offsets[index + 1]] = image.ravel()
        self.filled[index] = True


class DiskCache(NoCache):
    """Each image as a file of raw bytes, named by the original's path, size, time and the shape it was resized to."""

    def __init__(self, folder: Path, paths: Sequence[str], shapes: np.ndarray, variant: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.paths, self.shapes, self.variant = folder, paths, shapes, variant

    def file(self, index: int) -> Path:
        """Where image ``index`` is or would be kept; an edited original gets another name."""
        path = os.path.abspath(self.paths[index])
        status = os.stat(path)
        height, width = self.shapes[index]
        key = f"{path}|{status.st_size}|{status.st_mtime_ns}|{height}x{width}|{self.variant}"
        return self.folder / f"{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:32]}.rgb"

    def get(self, index: int) -> np.ndarray | None:
        """The (h, w, 3) uint8 image ``index``, or None when its file is not there or not whole."""
        try:
            data = np.fromfile(self.file(index), np.uint8)
        except OSError:
            return None
        shape = (*self.shapes[index], 3)
        return data.reshape(shape) if data.size == np.prod(shape) else None

    def put(self, index: int, image: np.ndarray) -> None:
        """Keep image ``index``."""
        with atomic_open(self.file(index)) as file:
            file.write(image.tobytes())


def make_cache(
    kind: str, paths: Sequence[str], shapes: np.ndarray, load: Callable[[int], np.ndarray], variant: str, prefix: str
) -> NoCache:
    """Build and fill the cache ``kind``: '' (none), 'ram' or 'disk'.

    ``shapes`` (n, 2): height and width as loaded; ``load(i)`` reads image i; ``variant`` tells ways of resizing
    apart. When memory or disk space would run short it says so and caches nothing. Raises ConfigError for an
    unknown kind.
    """
    if kind not in ("", "ram", "disk"):
        raise ConfigError(f"--cache {kind}: expected ram or disk")
    if not kind or not len(paths):
        return NoCache()
    need = int(shapes.astype(np.int64).prod(1).sum() * 3 * _SPARE)
    folder = user_cache_dir() / "images"
    free = available_memory() if kind == "ram" else _free_space(folder)
    if need > free:
        what = "RAM" if kind == "ram" else f"disk space in {folder}"
        LOGGER.warning(f"{prefix}{need / GB:.1f}GB {what} required, {free / GB:.1f}GB available, not caching images")
        return NoCache()
    try:
        cache = RamCache(shapes) if kind == "ram" else DiskCache(folder, paths, shapes, variant)
        _fill(cache, load, len(paths), f"{prefix}Caching images ({need / _SPARE / GB:.1f}GB {kind})")
    except OSError as error:
        LOGGER.warning(f"{prefix}{folder}: cannot keep images there ({error.strerror}), not caching")
        return NoCache()
    return cache


def _fill(cache: RamCache | DiskCache, load: Callable[[int], np.ndarray], count: int, title: str) -> None:
    def keep(index: int) -> None:
        if cache.get(index) is None:
            cache.put(index, load(index))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # OpenCV decodes outside the interpreter lock
        for _ in progress(pool.map(keep, range(count)), total=count, desc=title):
            pass


def available_memory() -> int:
    """Bytes this process may still take: the machine's free memory or, if smaller, what is left to its container."""
    import psutil

    available = psutil.virtual_memory().available
    try:  # control group v2, as in containers
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return min(available, max(int(limit) - used, 0)) if limit.isdigit() else available


def _free_space(folder: Path) -> int:
    existing = next((p for p in (folder, *folder.parents) if p.exists()), Path("/"))
    return shutil.disk_usage(existing).free
