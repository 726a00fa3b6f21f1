"""Images kept decoded and resized for the next epochs: in memory, or as raw files in the user's cache folder.

Nothing is ever written into the data set.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from utils.console import LOGGER, progress
from utils.cores import available_cores
from utils.dist import World, gather
from utils.errors import ConfigError, DataError
from utils.files import atomic_open
from utils.label_cache import user_cache_dir

GB = 1 << 30
_SPARE = 1.1  # decoded images are not all that a training needs


class NoCache:
    """Keeps nothing."""

    def get(self, index: int) -> np.ndarray | None:
        """The (h, w, 3) uint8 image ``index``, or None when it is not kept."""
        return None


class SharedBytes:
    """Memory that every process of this machine can map, once in RAM however many do.

    It has no name in the file system: the system frees it with the last process that uses it, also after kill -9. Other
    processes reach it through ``key``, the process and descriptor that hold it, for as long as that process lives.
    """

    def __init__(self, size: int) -> None:
        self.size, self.key = size, None
        if not hasattr(os, "memfd_create"):  # not Linux: shared with forked processes only
            self._map = mmap.mmap(-1, size)
            return
        self._fd = os.memfd_create("dcn-yolov5-images")
        os.ftruncate(self._fd, size)
        self._map = mmap.mmap(self._fd, size)
        self.key = os.getpid(), self._fd

    @classmethod
    def attach(cls, key: tuple[int, int], size: int) -> SharedBytes:
        """The memory of another process. Raises OSError when it is gone or not ours to see."""
        found = cls.__new__(cls)
        found.size, found.key = size, key
        fd = os.open("/proc/{}/fd/{}".format(*key), os.O_RDWR)
        try:
            found._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        return found

    def array(self) -> np.ndarray:
        """(size,) uint8, zeros at first."""
        return np.frombuffer(self._map, np.uint8)

    def __reduce__(self) -> tuple:
        if self.key is None:
            raise TypeError("this memory is shared by forking only")
        return SharedBytes.attach, (self.key, self.size)


class RamCache(NoCache):
    """All images in one block of memory, shared by the loader processes and by all training processes of a machine."""

    def __init__(self, shapes: np.ndarray, block: SharedBytes | None = None) -> None:
        """``shapes`` (n, 2): height and width of each image. ``block``: another process's memory for the same images.
        Raises OSError when there is no such memory."""
        self.shapes = shapes
        # first a byte for each image that tells whether it is there
        self.offsets = np.concatenate(([0], np.cumsum(shapes.astype(np.int64).prod(1) * 3))) + len(shapes)
        self.block = block or SharedBytes(cache_bytes(shapes))
        self._open()

    def _open(self) -> None:
        self.pool = self.block.array()
        self.filled = self.pool[: len(self.shapes)]

    def __getstate__(self) -> dict:
        return {"shapes": self.shapes, "offsets": self.offsets, "block": self.block}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def get(self, index: int) -> np.ndarray | None:
        """The (h, w, 3) uint8 image ``index`` (not to be changed), or None before it is put."""
        if not self.filled[index]:
            return None
        block = self.pool[self.offsets[index] : self.offsets[index + 1]]
        return block.reshape(*self.shapes[index], 3)

    def put(self, index: int, image: np.ndarray) -> None:
        """Keep image ``index``."""
        self.pool[self.offsets[index] : self.offsets[index + 1]] = image.ravel()
        self.filled[index] = 1


def cache_bytes(shapes: np.ndarray) -> int:
    """What a RamCache of images of these (n, 2) shapes takes."""
    return int(shapes.astype(np.int64).prod(1).sum() * 3) + len(shapes)


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
        """The (h, w, 3) uint8 image ``index``, mapped from the system's file cache (what the mosaic does not show is
        not read), or None when its file is not there or not whole."""
        height, width = map(int, self.shapes[index])
        try:
            with open(self.file(index), "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError):  # ValueError: an empty file
            return None
        whole = len(data) == height * width * 3
        return np.frombuffer(data, np.uint8).reshape(height, width, 3) if whole else None

    def put(self, index: int, image: np.ndarray) -> None:
        """Keep image ``index``."""
        with atomic_open(self.file(index)) as file:
            file.write(image.tobytes())


def make_cache(
    kind: str,
    paths: Sequence[str],
    shapes: np.ndarray,
    load: Callable[[int], np.ndarray],
    variant: str,
    prefix: str,
    world: World = World(),
    tolerant: bool = False,
) -> NoCache:
    """Build and fill the cache ``kind``: '' (none), 'ram' or 'disk'.

    ``shapes`` (n, 2): height and width as loaded; ``load(i)`` reads image i; ``variant`` tells ways of resizing
    apart. ``world``: all of its processes call this together; those of one machine share the cache and fill it
    together. When memory or disk space would run short it says so and caches nothing. ``tolerant``: an image that
    ``load`` cannot read (DataError) is left out. Raises ConfigError for an unknown kind.
    """
    if kind not in ("", "ram", "disk"):
        raise ConfigError(f"--cache {kind}: expected ram or disk")
    if not kind or not len(paths):
        return NoCache()
    need = int(shapes.astype(np.int64).prod(1).sum() * 3)
    folder = user_cache_dir() / "images"
    machines = gather(_machine(world), world)
    peers = [rank for rank, machine in enumerate(machines) if machine == machines[world.rank]]
    cache: NoCache | None = None
    leader = peers[0] == world.rank
    if leader:
        cache = _new_cache(kind, folder, paths, shapes, variant, prefix, need)
    key = gather(_key(cache), world)[peers[0]]  # how the others of this machine find it
    try:
        if not leader and key is not None:
            block = SharedBytes.attach(key, cache_bytes(shapes)) if kind == "ram" else None
            cache = RamCache(shapes, block) if kind == "ram" else DiskCache(folder, paths, shapes, variant)
        if cache is not None:
            title = f"{prefix}Caching images ({need / GB:.1f}GB {kind})"
            numbers = range(peers.index(world.rank), len(paths), len(peers))
            _fill(cache, load, numbers, title, world.main, tolerant)
    except OSError as error:
        LOGGER.warning(f"{prefix}cannot keep images in {kind} ({error.strerror}; {folder}), not caching")
        cache = None
    gather(None, world)  # the others' images are there as well
    return cache or NoCache()


def _machine(world: World) -> str:
    """What processes that can map each other's memory have in common: the running kernel and the process numbers."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{kernel} {os.readlink('/proc/self/ns/pid')}" if hasattr(os, "memfd_create") else f"rank {world.rank}"
    except OSError:
        return f"rank {world.rank}"  # each for itself


def _new_cache(
    kind: str, folder: Path, paths: Sequence[str], shapes: np.ndarray, variant: str, prefix: str, need: int
) -> RamCache | DiskCache | None:
    """An empty cache, or None, said in a line, when ``need`` bytes and a tenth are not to be had."""
    free = available_memory() if kind == "ram" else _free_space(folder)
    what, instead = ("RAM", "; try --cache disk") if kind == "ram" else (f"disk space in {folder}", "")
    if need * _SPARE > free:
        sizes = f"{need * _SPARE / GB:.1f}GB {what} required, {free / GB:.1f}GB available"
        LOGGER.warning(f"{prefix}{sizes}, not caching images{instead}")
        return None
    try:
        return RamCache(shapes) if kind == "ram" else DiskCache(folder, paths, shapes, variant)
    except OSError as error:
        LOGGER.warning(f"{prefix}cannot keep images in {what} ({error.strerror}), not caching")
        return None


def _key(cache: RamCache | DiskCache | None) -> tuple[int, int] | None:
    """What the leader of a machine tells the others; the folder of a disk cache they know."""
    if isinstance(cache, RamCache):
        return cache.block.key
    return None if cache is None else (0, 0)


def _fill(
    cache: RamCache | DiskCache,
    load: Callable[[int], np.ndarray],
    numbers: Sequence[int],
    title: str,
    show: bool,
    tolerant: bool,
) -> None:
    def keep(index: int) -> None:
        if cache.get(index) is not None:
            return
        try:
            cache.put(index, load(index))
        except DataError:
            if not tolerant:
                raise

    with ThreadPoolExecutor(min(8, available_cores())) as pool:  # OpenCV decodes outside the interpreter lock
        for _ in progress(pool.map(keep, numbers), total=len(numbers), desc=title, enabled=show):
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
