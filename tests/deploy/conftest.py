"""Checkpoints to export, and a picture to compare on. What takes seconds to export is exported once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.exporter import ExportOptions, Job, prepare
from models.yolo import DetectionModel
from utils.checkpoint import save_checkpoint
from utils.images import read_image

ROOT = Path(__file__).resolve().parents[2]
CELLS = ROOT / "data" / "bccd" / "images" / "val"
TINY = {
    "nc": 3,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119]],
    "backbone": [
        [-1, 1, "Conv", [8, 6, 2, 2]],
        [-1, 1, "DCN", [16, 3, 2]],
        [-1, 1, "C3DCN", [16]],
        [-1, 1, "Conv", [24, 3, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
    ],
    "head": [[[3, 4], 1, "Detect", ["nc", "anchors"]]],
}


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    return read_image(sorted(CELLS.glob("*.jpg"))[0])


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """yolov5n-dcn, trained on blood cells."""
    copy = tmp_path_factory.mktemp("trained") / "cells.pt"
    return Path(shutil.copy(ROOT / "data" / "demo" / "yolov5n-dcn-start.pt", copy))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of six layers with each kind of DCN, whose offsets are a pixel or two and whose scores spread."""
    generator = torch.Generator().manual_seed(3)
    model = DetectionModel(TINY)
    for name, parameter in model.named_parameters():
        if "conv_offset_mask" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * (0.3 if name.endswith("bias") else 0.1)
        elif name.endswith(("m.0.weight", "m.1.weight")):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 60
        elif name.endswith(("m.0.bias", "m.1.bias")):
            parameter.data.zero_()
    return saved(model, tmp_path_factory.mktemp("tiny") / "tiny.pt")


def saved(model: DetectionModel, path: Path) -> Path:
    names = ["red", "white", "platelet"]
    save_checkpoint(path, model.state_dict(), {"yaml": model.yaml, "nc": model.nc, "names": names})
    return path


@pytest.fixture(scope="session")
def make_job(picture: np.ndarray):
    """``make_job(weights, **options)``: a Job with files in a folder of its own, if ``folder`` says so."""

    def make(path: Path, **options) -> Job:
        return prepare(path, ExportOptions(**{"imgsz": (96, 128), **options}), picture)

    return make
