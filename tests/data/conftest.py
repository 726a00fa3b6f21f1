"""Data sets written for a test: the reference images, and small ones with chosen faults."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.fill import u

OLD = 1_600_000_000  # long before any scan: such files may be taken from the cache


@pytest.fixture(scope="session")
def facts(reference: Path) -> dict:
    """tests/reference/data.json."""
    return json.loads((reference / "data.json").read_text())


@pytest.fixture(scope="session")
def arrays(reference: Path) -> dict[str, np.ndarray]:
    """tests/reference/data.npz."""
    with np.load(reference / "data.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture(scope="session")
def reference_set(tmp_path_factory: pytest.TempPathFactory, facts: dict) -> Path:
    """The folder of images im00.png, ... that the reference values were measured on."""
    root = tmp_path_factory.mktemp("reference")
    (root / "images").mkdir()
    (root / "labels").mkdir()
    for number, item in enumerate(facts["images"]):
        size = item["h"] * item["w"] * 3
        bgr = np.floor(255 * u(f"data/im{number}", size)).astype(np.uint8).reshape(item["h"], item["w"], 3)
        cv2.imwrite(str(root / "images" / item["name"]), bgr)
        rows = "".join(" ".join(row) + "\n" for row in item["labels"])
        (root / "labels" / item["name"]).with_suffix(".txt").write_text(rows)
    return root / "images"


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., Path]:
    """``make_set({"a": "0 .5 .5 .2 .2", "b": None})`` writes images/a.png, ... (None: without a label file)."""

    def make(labels: dict[str, str | None], split: str = "train", size: tuple[int, int] = (40, 60)) -> Path:
        images, folder = tmp_path / "images" / split, tmp_path / "labels" / split
        images.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        for number, (name, text) in enumerate(labels.items()):
            pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
            cv2.imwrite(str(images / f"{name}.png"), pixels)
            settle(images / f"{name}.png")
            if text is not None:
                (folder / f"{name}.txt").write_text(text)
                settle(folder / f"{name}.txt")
        return images

    return make


def settle(path: Path, second: int = 0) -> None:
    """Give a file an old modification time."""
    os.utime(path, (OLD + second, OLD + second))
