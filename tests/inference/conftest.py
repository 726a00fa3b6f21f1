"""A model that finds what it is told to, and sources to find it in."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from models.api import Detector
from models.yolo import DetectionModel
from utils.checkpoint import save_checkpoint
from utils.console import LOGGER

NAMES = {0: "red", 1: "green", 2: "blue"}


class FakeModel(nn.Module):
    """Answers every image with the same boxes, rows of (cx, cy, w, h in network pixels, confidence, class)."""

    def __init__(self, boxes: list[tuple], names: dict[int, str] = NAMES) -> None:
        super().__init__()
        self.names, self.stride = names, torch.tensor([32.0])
        self.boxes = boxes
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, list]:
        self.seen.append(tuple(images.shape))
        rows = torch.zeros(len(self.boxes), 5 + len(self.names))
        for row, (*box, conf, cls) in zip(rows, self.boxes):
            row[:4], row[4], row[5 + cls] = torch.tensor(box), conf, 1.0
        return rows.expand(len(images), -1, -1), []


BOXES = [(48, 32, 40, 20, 0.9, 1), (20, 20, 10, 10, 0.5, 0), (90, 50, 12, 8, 0.75, 1)]
"""Three boxes in a 96 x 128 network input: the picture of 96 x 128 pixels itself."""


def picture(height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    """Noise, uint8 (H, W, 3) RGB."""
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def write_png(path: Path, seed: int = 0, height: int = 96, width: int = 128) -> Path:
    """A picture file, its folder made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), picture(height, width, seed)[:, :, ::-1])
    return path


def write_video(path: Path, frames: int = 5, height: int = 96, width: int = 128, fps: float = 10) -> Path:
    """An mp4 whose i-th frame has brightness 40 i."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height))
    assert writer.isOpened()
    for i in range(frames):
        writer.write(np.full((height, width, 3), 40 * i, np.uint8))
    writer.release()
    return path


@pytest.fixture
def detector() -> Detector:
    """Finds BOXES in everything, on the CPU."""
    return Detector(FakeModel(BOXES), torch.device("cpu"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """yolov5n with three classes and random weights, as a checkpoint file."""
    torch.manual_seed(0)
    model = DetectionModel("yolov5n.yaml", nc=3)
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    meta = {"yaml": model.yaml, "nc": 3, "names": NAMES, "imgsz": 128}
    save_checkpoint(path, model.state_dict(), meta, train={"epoch": 3})
    return path


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the repository's logger says."""
    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level("INFO", logger=LOGGER.name)
    return caplog
