"""Scanning a data set: counts, faults by file and row, and a cache that notices every change."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import settle
from utils import label_cache
from utils.errors import DataError
from utils.label_cache import scan_labels
from utils.label_index import PackedStrings, gather, offsets_of

ROW = "0 .5 .5 .2 .2\n"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that were really scanned."""
    seen: list[str] = []
    real = label_cache.read_entry

    def counting(path: str, nc: int | None) -> label_cache.Entry:
        seen.append(Path(path).stem)
        return real(path, nc)

    monkeypatch.setattr(label_cache, "read_entry", counting)
    return seen


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def test_the_count_line_and_the_faults(make_set: Callable, log: pytest.LogCaptureFixture) -> None:
    images = make_set(
        {
            "good": ROW + "1 .3 .3 .1 .1\n",
            "half": ROW + "5 .5 .5 .1 .1\n",
            "bad": "0 .5 .5\n",
            "empty": "",
            "missing": None,
            "broken": ROW,
        }
    )
    (images / "broken.png").write_bytes(b"no picture")
    index = scan_labels(images, nc=2, prefix="train")
    labels = str(images).replace("images", "labels")
    assert f"train: Scanning {labels}... 5 images, 2 backgrounds, 2 corrupt, 2 bad rows dropped" in log.text
    assert f"train: {labels}/half.txt:2: class 5 but the data set has 2 names (0..1)" in log.text
    assert f"{labels}/bad.txt:1: 3 columns, expected 5" in log.text
    assert f"{labels}/bad.txt: none of its 1 rows can be used, the image is left out" in log.text
    assert f"{images}/broken.png: not an image" in log.text
    assert [Path(index.paths[i]).stem for i in range(len(index))] == ["empty", "good", "half", "missing"]
    assert index.offsets.tolist() == [0, 0, 2, 3, 3] and index.sizes.tolist() == [[60, 40]] * 4
    with pytest.raises(DataError, match=r"train: 4 faults .*--strict-data.*bad.txt:1"):
        scan_labels(images, nc=2, prefix="train", strict=True)


def test_many_faults_are_cut_short(make_set: Callable, log: pytest.LogCaptureFixture) -> None:
    scan_labels(make_set({"a": ROW + "0 1\n" * 25}), nc=1)
    assert log.text.count("a.txt:") == label_cache.MAX_SHOWN
    assert "and 15 more (train.py --check-data lists them all)" in log.text


def test_the_second_start_reads_nothing(make_set: Callable, reads: list, log: pytest.LogCaptureFixture) -> None:
    polygon = "1 .1 .2 .5 .2 .3 .6\n"
    images = make_set({"a": ROW + polygon, "b": "", "c": None, "d": "bad row\n" + ROW})
    first = scan_labels(images, nc=2, prefix="val")
    assert sorted(reads) == ["a", "b", "c", "d"]
    cache = Path(str(images).replace("images", "labels") + ".cache.npz")
    assert f"New cache created: {cache}" in log.text
    reads.clear()
    log.clear()
    second = scan_labels(images, nc=2, prefix="val")
    assert reads == [] and f"val: Scanning {cache} 3 images" in log.text and "d.txt:1" in log.text
    for field in ("sizes", "labels", "offsets", "points", "point_offsets"):
        np.testing.assert_array_equal(getattr(first, field), getattr(second, field))
    assert [len(s) for s in second.segments(0)] == [0, 3] and second.segments(1) is None
    assert second.summary() == first.summary()
    with np.load(cache, allow_pickle=False) as file:
        assert all(file[key].dtype != object for key in file.files)


def test_a_changed_file_is_read_again_and_only_it(make_set: Callable, reads: list) -> None:
    images = make_set({name: ROW for name in "abc"})
    labels = Path(str(images).replace("images", "labels"))
    scan_labels(images, nc=2)
    reads.clear()
    (labels / "b.txt").write_text("1 .5 .5 .2 .2\n")  # same size
    settle(labels / "b.txt", 5)
    assert scan_labels(images, nc=2).labels[:, 0].tolist() == [0, 1, 0]
    (labels / "c.txt").unlink()
    assert scan_labels(images, nc=2).missing == 1
    settle(images / "a.png", 7)
    make_set({"d": ROW})
    scan_labels(images, nc=2)
    assert reads == ["b", "c", "a", "d"]
    (images / "a.png").unlink()
    assert len(scan_labels(images, nc=2)) == 3
    reads.clear()
    scan_labels(images, nc=1)  # class numbers must be judged anew
    assert len(reads) == 3


def test_an_incremental_scan_is_a_scan(make_set: Callable, reads: list) -> None:
    """Whatever changed, the cache's answer is that of reading everything anew, and only what changed is read."""
    rng = np.random.default_rng(3)
    polygon = "1 .1 .2 .5 .2 .3 .6\n"
    kinds = [ROW, ROW + polygon, "", None, "bad\n" + ROW, "bad\n", polygon, ROW + "1 .2 .2 .1 .1\n"]
    images = make_set({f"im{i:02d}": kinds[i % len(kinds)] for i in range(24)})
    labels = Path(str(images).replace("images", "labels"))
    cache = Path(f"{labels}.cache.npz")
    scan_labels(images, nc=2)
    for turn in range(12):
        touched = set()
        for number in rng.choice(30, 3, replace=False):
            name, kind = f"im{number:02d}", kinds[rng.integers(len(kinds))]
            if rng.random() < 0.3:
                (images / f"{name}.png").unlink(missing_ok=True)
                continue
            (labels / f"{name}.txt").unlink(missing_ok=True)
            make_set({name: kind})
            settle(images / f"{name}.png", turn + 1)
            touched.add(name)
        reads.clear()
        index = scan_labels(images, nc=2)
        assert set(reads) <= touched
        kept = cache.read_bytes()
        again = scan_labels(images, nc=2)
        cache.unlink()
        whole = scan_labels(images, nc=2)
        for other in (again, whole):
            assert [other.paths[i] for i in range(len(other))] == [index.paths[i] for i in range(len(index))]
            for field in ("sizes", "labels", "offsets", "points", "point_offsets"):
                np.testing.assert_array_equal(getattr(index, field), getattr(other, field))
            assert other.summary() == index.summary() and list(map(str, other.faults)) == list(map(str, index.faults))
        cache.write_bytes(kept)


@pytest.mark.parametrize("count", [5, 400])
def test_gathered_groups_are_the_groups(count: int) -> None:
    rng = np.random.default_rng(count)
    sizes = rng.integers(0, 4, count)
    values = rng.random((sizes.sum(), 2))
    offsets = offsets_of(sizes)
    groups = [values[a:b] for a, b in zip(offsets[:-1], offsets[1:])]
    orders = [np.arange(count), rng.permutation(count), np.arange(0), np.flatnonzero(rng.random(count) < 0.97)]
    for order in [*orders, rng.integers(0, count, 2 * count)]:
        rows, places = gather(values, offsets, order)
        assert places.tolist() == [0, *np.cumsum([len(groups[i]) for i in order])]
        np.testing.assert_array_equal(rows, np.concatenate([groups[i] for i in order] or [values[:0]]))


def test_a_file_edited_during_the_scan_is_not_trusted(make_set: Callable, reads: list) -> None:
    images = make_set({"a": ROW, "b": ROW})
    label = Path(str(images).replace("images", "labels")) / "a.txt"
    os.utime(label)  # now: a further edit within the clock's tick would leave size and time as they are
    scan_labels(images, nc=2)
    reads.clear()
    status = label.stat()
    label.write_text("1 .5 .5 .2 .2\n")
    os.utime(label, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert scan_labels(images, nc=2).labels[:, 0].tolist() == [1, 0] and reads == ["a"]


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "pickle", "other arrays"])
def test_a_damaged_cache_is_rebuilt(
    make_set: Callable, damage: str, reads: list, log: pytest.LogCaptureFixture
) -> None:
    images = make_set({"a": ROW})
    scan_labels(images, nc=1)
    cache = Path(str(images).replace("images", "labels") + ".cache.npz")
    whole = cache.read_bytes()
    if damage == "pickle":
        np.savez(cache, meta=np.array([{"a": 1}], object))
    elif damage == "other arrays":
        np.savez(cache, meta=np.frombuffer(b'{"version": 1}', np.uint8))
    else:
        cache.write_bytes({"cut": whole[: len(whole) // 2], "noise": b"\x93" * 500, "empty": b""}[damage])
    reads.clear()
    assert len(scan_labels(images, nc=1)) == 1
    assert reads == ["a"] and log.text.count("damaged or of another version") == 1
    assert cache.read_bytes()[:2] == b"PK"


def test_a_read_only_set_is_cached_elsewhere(make_set: Callable, reads: list, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_set({"a": ROW})
    real = label_cache.atomic_open

    def refusing(path: Path) -> object:
        if "user-cache" not in str(path):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path)

    monkeypatch.setattr(label_cache, "atomic_open", refusing)
    before = sorted(images.parent.parent.rglob("*"))
    scan_labels(images, nc=1)
    reads.clear()
    assert len(scan_labels(images, nc=1)) == 1 and reads == []
    assert [p for p in sorted(images.parent.parent.rglob("*")) if p not in before and "user-cache" not in str(p)] == []


def test_nowhere_to_write_is_said(
    make_set: Callable, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    def refusing(path: Path) -> object:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(label_cache, "atomic_open", refusing)
    assert len(scan_labels(make_set({"a": ROW}), nc=1)) == 1
    assert "labels are not cached" in log.text and "No space left" in log.text


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=f"val: no images found in {tmp_path}/images"):
        scan_labels(tmp_path / "images", nc=1, prefix="val")


def test_backgrounds_alone(make_set: Callable, log: pytest.LogCaptureFixture) -> None:
    images = make_set({"a": "", "b": ""})
    assert len(scan_labels(images, nc=1, prefix="val")) == 2
    assert "val: all 2 label files" in log.text
    with pytest.raises(DataError, match="train: all 2 label files in .* are empty; there is nothing to train on"):
        scan_labels(images, nc=1, prefix="train", require_labels=True)


def test_missing_labels_say_where_they_were_looked_for(make_set: Callable, tmp_path: Path) -> None:
    images = make_set({"a": None})
    label = str(images).replace("images", "labels")
    with pytest.raises(
        DataError, match=f"{images}/a.png should have {label}/a.txt, but {label} has no file of that name"
    ):
        scan_labels(images, require_labels=True)
    Path(label).rmdir()
    with pytest.raises(
        DataError, match="does not exist; labels lie where the last 'images' of the path reads 'labels'"
    ):
        scan_labels(images, require_labels=True)
    images.rename(tmp_path / "pictures")
    with pytest.raises(DataError, match="called 'images', so labels must lie beside the images"):
        scan_labels(tmp_path / "pictures", require_labels=True)


def test_nothing_usable(make_set: Callable) -> None:
    with pytest.raises(DataError, match="none of the 1 images can be used; the first: .*a.txt:1: 6 columns"):
        scan_labels(make_set({"a": "0 .5 .5 .1 .1 .9"}), nc=1)


def test_lists_and_several_sources(make_set: Callable, tmp_path: Path) -> None:
    train = make_set({"a": ROW, "b": ROW})
    other = make_set({"c": ROW}, split="extra")
    listed = tmp_path / "some.txt"
    listed.write_text(f"{train}/a.png\n{other}/c.png\n")
    assert len(scan_labels(listed, nc=1)) == 2 and (tmp_path / "some.cache.npz").exists()
    assert len(scan_labels([train, other], nc=1)) == 3
    assert len(scan_labels(train, nc=1)) == 2
    caches = sorted(p.name for p in (tmp_path / "labels").glob("*.npz"))
    assert len(caches) == 2 and caches[1] == "train.cache.npz" and caches[0].startswith("train-")


def test_packed_strings() -> None:
    texts = ["a", "", "münchen/猫.jpg", "b" * 300]
    packed = PackedStrings(texts)
    assert [packed[i] for i in range(4)] == texts and packed[-1] == texts[-1] and len(packed) == 4
    with pytest.raises(IndexError):
        packed[4]


def test_a_label_that_cannot_be_read_is_a_fault_of_the_label(make_set: Callable[..., Path]) -> None:
    images = make_set({"a": ROW, "b": None, "c": "x", "d": None})
    labels = images.parents[1] / "labels" / images.name
    (labels / "b.txt").symlink_to(labels / "nowhere.txt")
    (labels / "c.txt").write_bytes(ROW.encode("utf-16"))
    index = scan_labels(images, nc=1)
    assert [Path(fault.path).name for fault in index.faults] == ["b.txt", "c.txt"]
    assert (index.corrupt, index.missing) == (2, 1)
