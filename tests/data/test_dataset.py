"""The data set: evaluation items as measured from upstream, shapes, randomness, caches, weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from utils.config import Hyp
from utils.dataset import DetectionDataset, Draw, class_weights, image_weights, resized_shapes
from utils.errors import ConfigError, DataError
from utils.image_cache import available_memory

ROWS = "0 .5 .5 .4 .4\n1 .3 .3 .2 .2\n"


def test_evaluation_items(facts: dict, reference_set: Path) -> None:
    for case in facts["rect_eval"]:
        data = DetectionDataset(
            reference_set,
            case["img_size"],
            rect=case["rect"],
            batch_size=case["batch"],
            stride=case["stride"],
            pad=case["pad"],
            nc=4,
            show=False,
        )
        if case["rect"]:
            assert [Path(data.path(i)).name for i in range(len(data))] == case["order"]
            assert data.batch_shapes.tolist() == case["batch_shapes"]
        for i, item in enumerate(case["items"]):
            sample = data[i]
            assert Path(sample.path).name == item["file"]
            assert sample.image.shape == (*item["tensor"][1:], 3) and sample.image.flags["C_CONTIGUOUS"]
            np.testing.assert_allclose(sample.labels, np.float32(item["labels"]).reshape(-1, 5), atol=1e-5)
            assert sample.letterbox.original == tuple(item["shape0"])
            assert sample.letterbox.pad == tuple(item["pad"])
            # the measured record is (h, w); ours is (x, y) and would include a ratio of the letterbox itself
            np.testing.assert_allclose(sample.letterbox.ratio[::-1], item["ratio"], atol=1e-12)


def test_resized_shapes(facts: dict) -> None:
    cases = facts["load_image_resize_to_640"]
    sizes = np.array([(case["w0"], case["h0"]) for case in cases])
    assert resized_shapes(sizes, 640).tolist() == [case["hw"] for case in cases]


@pytest.mark.parametrize("imgsz", [320, 416, 640, 1280])
def test_the_longest_side_is_the_image_size_exactly(imgsz: int) -> None:
    sizes = np.array([(side, side // 2 + 1) for side in range(1, 3000)])
    assert (resized_shapes(sizes, imgsz).max(1) == imgsz).all()


def test_class_and_image_weights(facts: dict) -> None:
    case = facts["class_weights"]
    classes = np.array([c for image in case["classes_per_image"] for c in image])
    offsets = np.cumsum([0, *map(len, case["classes_per_image"])])
    weights = class_weights(classes, case["nc"])
    np.testing.assert_allclose(weights, case["class_weights_before_times_nc"], atol=1e-7)
    # with all maps 0 the familiar rule is class_weights * nc * (1 - map)^2 / nc
    np.testing.assert_allclose(image_weights(classes, offsets, weights), case["image_weights_with_maps0"], atol=1e-7)


def test_training_samples_depend_on_seed_epoch_and_index_only(make_set: Callable) -> None:
    images = make_set({name: ROWS for name in "abcdef"})
    options = {"augment": True, "nc": 2, "hyp": Hyp(mixup=0.5, degrees=5), "show": False}
    data, again = (DetectionDataset(images, 64, seed=3, **options) for _ in range(2))
    first = data[Draw(5, 2)]
    data[Draw(0, 1)]
    np.testing.assert_array_equal(first.image, again[Draw(5, 2)].image)
    np.testing.assert_array_equal(first.labels, again[Draw(5, 2)].labels)
    again.set_epoch(5)
    np.testing.assert_array_equal(first.image, again[2].image)
    others = [data[Draw(6, 2)], data[Draw(5, 2, 1)], data[Draw(5, 3)]]
    others.append(DetectionDataset(images, 64, seed=4, **options)[Draw(5, 2)])
    assert not any(np.array_equal(first.image, other.image) for other in others)
    assert first.image.shape == (64, 64, 3) and first.image.flags["C_CONTIGUOUS"]
    assert first.labels.dtype == np.float32 and ((first.labels[:, 1:] >= 0) & (first.labels[:, 1:] <= 1)).all()


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_a_batch_is_its_samples_in_one_block(make_set: Callable, mosaic: float) -> None:
    images = make_set({name: ROWS for name in "abcd"})
    data = DetectionDataset(images, 64, augment=True, nc=2, hyp=Hyp(mosaic=mosaic), show=False, tolerant=True)
    (images / "b.png").unlink()
    draws = [Draw(1, i) for i in range(4)]
    samples = data.__getitems__(draws)
    assert samples.pixels.shape == (4, 64, 64, 3)
    for draw, sample, pixels in zip(draws, samples, samples.pixels.numpy()):
        alone = data[draw]
        np.testing.assert_array_equal(sample.image, alone.image)
        np.testing.assert_array_equal(pixels, alone.image)
        np.testing.assert_array_equal(sample.labels, alone.labels)
        assert sample.skipped == alone.skipped


def test_images_are_enlarged_by_the_augmentation_alone(make_set: Callable) -> None:
    """A small file is not enlarged before it is augmented, a large one is reduced; validation sees neither."""
    images = make_set({"a": ROWS}, size=(40, 60))
    assert DetectionDataset(images, 120, augment=True, nc=2, show=False).load_image(0).shape == (40, 60, 3)
    assert DetectionDataset(images, 30, augment=True, nc=2, show=False).load_image(0).shape == (20, 30, 3)
    assert DetectionDataset(images, 120, nc=2, show=False).load_image(0).shape == (80, 120, 3)


def test_mosaic_closes_from_the_given_epoch(make_set: Callable) -> None:
    data = DetectionDataset(make_set({n: ROWS for n in "ab"}), 64, augment=True, nc=2, close_mosaic_epoch=3, show=False)
    still = Hyp(translate=0, scale=0, hsv_h=0, hsv_s=0, hsv_v=0, fliplr=0)
    data.hyp = still
    assert data[Draw(2, 0)].letterbox is None
    sample = data[Draw(3, 0)]
    assert sample.letterbox is not None and len(sample.labels) == 2


def test_without_augmentation_a_training_sample_is_the_letterboxed_image(make_set: Callable) -> None:
    names = ("hsv_h", "hsv_s", "hsv_v", "translate", "scale", "fliplr", "mosaic")
    hyp = Hyp(**dict.fromkeys(names, 0.0))
    data = DetectionDataset(make_set({"a": ROWS}, size=(64, 32)), 64, augment=True, nc=2, hyp=hyp, show=False)
    plain = DetectionDataset(data.path(0), 64, nc=2, show=False)
    np.testing.assert_array_equal(data[0].image, plain[0].image)
    np.testing.assert_array_equal(data[0].labels, plain[0].labels)


def test_single_class(make_set: Callable) -> None:
    data = DetectionDataset(make_set({"a": ROWS, "b": "7 .5 .5 .1 .1"}), 64, single_cls=True, show=False)
    assert data.class_counts().tolist() == [3] and data.nc == 1


def test_class_counts_and_shapes(make_set: Callable) -> None:
    data = DetectionDataset(make_set({"a": ROWS, "b": ROWS}), 64, names=["x", "y", "z"], show=False)
    assert data.class_counts().tolist() == [2, 2, 0]
    assert data.shapes.tolist() == [[60, 40]] * 2
    assert data.offsets.tolist() == [0, 2, 4] and data.labels.shape == (4, 5)


def test_box_sizes_are_in_pixels_of_the_scaled_image(make_set: Callable) -> None:
    images = make_set({"a": ROWS, "b": "", "c": ROWS})  # 60 x 40 pixels
    data = DetectionDataset(images, 120, nc=2, show=False)
    expected = np.array([(48, 32), (24, 16)] * 2)
    np.testing.assert_allclose(data.box_sizes(9, np.random.default_rng(0)), expected, rtol=1e-6)
    some = data.box_sizes(3, np.random.default_rng(0))
    assert len(some) == 3 and all(any(np.allclose(row, one) for one in expected) for row in some)


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_cached_images_are_the_images(make_set: Callable, kind: str, tmp_path: Path) -> None:
    images = make_set({name: ROWS for name in "abc"})
    before = {p: p.read_bytes() for p in images.iterdir()}
    plain = DetectionDataset(images, 32, nc=2, show=False)
    for _ in range(2):  # the second time from files that exist
        cached = DetectionDataset(images, 32, nc=2, cache=kind, show=False)
        assert all(cached.cache.get(i) is not None for i in range(3))
        for i in range(3):
            np.testing.assert_array_equal(cached[i].image, plain[i].image)
    assert {p: p.read_bytes() for p in images.iterdir()} == before
    if kind == "disk":
        assert len(list((tmp_path / "user-cache").rglob("*.rgb"))) == 3
        os.utime(images / "a.png", (2_000_000, 2_000_000))  # an edited original is not the cached one
        assert cached.cache.get(0) is None
        assert cached.load_image(0).shape == plain.load_image(0).shape


def test_cache_that_does_not_fit_is_left_out(
    make_set: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("utils.image_cache.available_memory", lambda: 1000)
    data = DetectionDataset(make_set({"a": ROWS}), 64, nc=2, cache="ram", prefix="train", show=False)
    assert data.cache.get(0) is None and "not caching images" in caplog.text
    assert available_memory() > 1000
    with pytest.raises(ConfigError, match="--cache floppy: expected ram or disk"):
        DetectionDataset(data.path(0), 64, nc=2, cache="floppy", show=False)


def test_an_image_exchanged_during_the_run_is_named(make_set: Callable) -> None:
    images = make_set({"a": ROWS, "b": ROWS})
    data = DetectionDataset(images, 64, nc=2, show=False)
    make_set({"a": ROWS}, size=(30, 30))
    with pytest.raises(DataError, match="a.png: is 30x30 pixels but was 60x40"):
        data[0]


@pytest.mark.parametrize("cache", ["", "ram"])
def test_a_rectangular_batch_keeps_its_frame_when_an_image_is_gone(make_set: Callable, cache: str) -> None:
    """The next image that can be read is of the next batch, whose frame is another."""
    images = make_set({name: ROWS for name in "ab"}, size=(40, 80))
    make_set({name: ROWS for name in "cd"}, size=(80, 40))
    options = {"augment": True, "nc": 2, "rect": True, "batch_size": 2, "show": False}
    data = DetectionDataset(images, 64, **options, tolerant=True)
    assert data.batch_shapes[0].tolist() != data.batch_shapes[1].tolist()
    Path(data.path(1)).unlink()
    data.keep_images(cache)
    samples = data.__getitems__([Draw(0, 0), Draw(0, 1)])
    assert samples[0].image.shape == samples[1].image.shape and samples[1].skipped


def test_a_strict_cache_reads_every_image(make_set: Callable) -> None:
    images = make_set({name: ROWS for name in "ab"})
    data = DetectionDataset(images, 64, augment=True, nc=2, show=False)
    Path(data.path(1)).unlink()
    with pytest.raises(DataError):
        data.keep_images("ram")


def test_another_batch_size_makes_other_frames(make_set: Callable) -> None:
    images = make_set({name: ROWS for name in "abc"}, size=(40, 80))
    make_set({"d": ROWS}, size=(80, 40))
    data, other = (
        DetectionDataset(images, 64, augment=True, nc=2, rect=True, batch_size=size, show=False) for size in (4, 2)
    )
    data.set_batch_size(2)
    assert data.batch_shapes.tolist() == other.batch_shapes.tolist() and data.batch_size == 2
    assert list(data.index.paths) == list(other.index.paths)
