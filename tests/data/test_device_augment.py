"""Colours and mirrors on the training device: the pictures that the loader would have made from the same draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from engine.parts import augments_on_device
from utils.augmentations import draw_hsv, finish
from utils.config import Hyp, TrainConfig
from utils.dataloaders import create_dataloader
from utils.dataset import DetectionDataset
from utils.device_augment import AT_ONCE, Finish, finish_batch, pack
from utils.errors import ConfigError

CPU = torch.device("cpu")
ROWS = "0 .5 .5 .4 .4\n1 .3 .3 .2 .2\n"


def batch_of(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) -> (B, 3, H, W), channels last in memory, as batches come."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_equal_to_the_loader_but_for_roundings(device: str) -> None:
    rng = np.random.default_rng(0)
    count = 2 * AT_ONCE + 3
    images = rng.integers(0, 256, (count, 60, 96, 3), np.uint8)
    images[: count // 2] = [cv2.GaussianBlur(image, (0, 0), 3) for image in images[: count // 2]]
    images[0, :20], images[0, 20:40], images[1] = 0, 255, 114
    draws = [draw_hsv(rng, (0.1, 0.7, 0.4)) for _ in range(count)]
    finishes = [Finish(tuple(d), bool(i % 2), bool(i % 3)) for i, d in enumerate(draws)]
    before = images.copy()
    out = finish_batch(batch_of(images).to(device), pack(finishes).to(device)).cpu()
    assert out.dtype == torch.uint8 and out.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(images, before)
    for image, done, made in zip(images, finishes, out.permute(0, 2, 3, 1).numpy()):
        expected = finish(image, np.array(done.factors), done.up_down, done.left_right)
        difference = made.astype(int) - expected
        # OpenCV's vector code cuts fractions off and its scalar code rounds: at most a third of a level to one side
        assert abs(difference.mean()) < 0.35 and np.median(difference) == 0
        assert (np.abs(difference) > 2).mean() < 0.01 and np.abs(difference).max() <= 20


def test_nothing_to_do_changes_nothing() -> None:
    images = batch_of(np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8))
    out = finish_batch(images, pack([Finish((1.0, 1.0, 1.0), False, False)] * 3))
    assert torch.equal(out, images)


@pytest.mark.parametrize("mosaic", [0.0, 0.5, 1.0])
def test_batches_are_those_of_the_loader(make_set: Callable, mosaic: float) -> None:
    images = make_set({f"im{i}": ROWS for i in range(7)})
    hyp = Hyp(mosaic=mosaic, mixup=0.4, flipud=0.3, degrees=0 if mosaic == 1 else 5)
    made = []
    for device in (None, CPU):
        for workers in (0, 2):
            data = DetectionDataset(images, 64, augment=True, nc=2, hyp=hyp, show=False)
            loader = create_dataloader(data, 4, shuffle=True, workers=workers, finish_on=device)
            loader.set_epoch(3)
            made.append([(b.images.clone(), b.targets.clone(), b.paths, b.finishes) for b in loader])
    for other in made[1:]:
        for (images1, targets1, paths1, _), (images2, targets2, paths2, left) in zip(made[0], other):
            assert torch.equal(targets1, targets2) and paths1 == paths2 and left is None
            assert (images1.float() - images2.float()).abs().mean() < 0.3
    for one, two in zip(made[2], made[3]):  # however many processes: bit for bit
        assert torch.equal(one[0], two[0])


def test_the_distribution_is_the_same(make_set: Callable) -> None:
    """Means and spreads of the channels over many samples, against what the draws alone change."""
    images = make_set({f"im{i}": ROWS for i in range(8)})
    statistics = []
    for device in (None, CPU):
        data = DetectionDataset(images, 64, augment=True, nc=2, show=False)
        loader = create_dataloader(data, 8, shuffle=True, workers=0, finish_on=device)
        pixels = []
        for epoch in range(12):
            loader.set_epoch(epoch)
            pixels += [b.images.float() for b in loader]
        every = torch.cat(pixels)
        statistics.append(torch.stack([every.mean((0, 2, 3)), every.std((0, 2, 3))]))
    assert (statistics[0] - statistics[1]).abs().max() < 0.2  # of 255


def test_quad_and_validation_leave_nothing(make_set: Callable) -> None:
    images = make_set({f"im{i}": ROWS for i in range(8)})
    for options, quad in (({"augment": True}, True), ({}, False)):
        loader = create_dataloader(
            DetectionDataset(images, 64, nc=2, show=False, **options), 4, workers=0, quad=quad, finish_on=CPU
        )
        assert loader.finish_on is None and all(b.finishes is None for b in loader)


def test_who_does_it() -> None:
    cfg = TrainConfig()
    assert not augments_on_device(cfg, CPU) and not augments_on_device(cfg, torch.device("cuda"))
    assert augments_on_device(replace(cfg, augment_device="gpu"), torch.device("cuda"))
    with pytest.raises(ConfigError, match="--augment-device gpu: training runs on the CPU"):
        augments_on_device(replace(cfg, augment_device="gpu"), CPU)
    with pytest.raises(ConfigError, match="--augment-device tpu: choose cpu or gpu"):
        replace(cfg, augment_device="tpu")
