"""Kept images: one copy for all processes, nothing left behind, read without copying."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from utils import image_cache
from utils.dist import World
from utils.image_cache import DiskCache, RamCache, SharedBytes, make_cache

SHAPES = np.array([(4, 6), (5, 5), (1, 7)], np.int32)


def pixels(index: int) -> np.ndarray:
    """Image ``index`` of SHAPES."""
    return np.random.default_rng(index).integers(0, 256, (*SHAPES[index], 3), np.uint8)


def test_one_memory_for_all_who_know_its_key() -> None:
    cache = RamCache(SHAPES)
    assert [cache.get(i) for i in range(3)] == [None] * 3
    cache.put(1, pixels(1))
    other = pickle.loads(pickle.dumps(cache))  # as a loader process that is not forked gets it
    np.testing.assert_array_equal(other.get(1), pixels(1))
    other.put(2, pixels(2))
    np.testing.assert_array_equal(cache.get(2), pixels(2))
    assert other.get(0) is None and not np.shares_memory(other.pool, cache.pool)


def test_a_lost_memory_is_an_os_error() -> None:
    with pytest.raises(OSError):
        SharedBytes.attach((os.getpid(), 99_999), 10)


CHILD = """
import os, sys
import numpy as np
from utils.image_cache import RamCache
cache = RamCache(np.array([(1000, 1000)]))
cache.put(0, np.full((1000, 1000, 3), 7, np.uint8))
if os.fork() == 0:  # as a loader process
    assert cache.get(0)[0, 0, 0] == 7
    os._exit(0)
os.wait()
print(*cache.block.key, flush=True)
sys.stdin.read()
"""


def test_kill_9_leaves_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    key = tuple(map(int, child.stdout.readline().split()))
    block = SharedBytes.attach(key, 1 + 3_000_000)  # another process sees the pixels
    assert block.array()[0] == 1 and (block.array()[1:] == 7).all()
    # what has a name outlives its process; /dev/shm itself is full of what other processes come and go with
    mapped = Path(f"/proc/{child.pid}/maps").read_text().splitlines()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not [line for line in mapped if "/dev/shm/" in line and not line.endswith("(deleted)")]
    with pytest.raises(OSError):
        SharedBytes.attach(key, 1 + 3_000_000)


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_processes_of_a_machine_fill_one_cache_together(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks as two threads, whose gather is a table and a barrier."""
    barrier, said = threading.Barrier(2), {}
    loads: list[tuple[int, int]] = []
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for path in paths:
        Path(path).touch()

    def gather(value: object, world: World) -> list:
        said[world.rank] = value
        barrier.wait(10)
        values = [said[0], said[1]]
        barrier.wait(10)
        return values

    monkeypatch.setattr(image_cache, "gather", gather)
    caches: dict[int, object] = {}

    def rank(number: int) -> None:
        def load(index: int) -> np.ndarray:
            loads.append((number, index))
            return pixels(index)

        caches[number] = make_cache(kind, paths, SHAPES, load, "area", "", World(number, number, 2))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(loads) == [(0, 0), (0, 2), (1, 1)]
    for cache in caches.values():
        for index in range(3):
            np.testing.assert_array_equal(cache.get(index), pixels(index))


def test_disk_images_are_mapped_not_copied_and_checked(tmp_path: Path) -> None:
    original = tmp_path / "a.png"
    original.touch()
    cache = DiskCache(tmp_path / "cache", [str(original)], SHAPES, "area")
    assert cache.get(0) is None
    cache.put(0, pixels(0))
    image = cache.get(0)
    np.testing.assert_array_equal(image, pixels(0))
    image[:] = 0  # who writes to it writes to a copy
    np.testing.assert_array_equal(cache.get(0), pixels(0))
    for content in (b"", bytes(5)):
        cache.file(0).write_bytes(content)
        assert cache.get(0) is None
