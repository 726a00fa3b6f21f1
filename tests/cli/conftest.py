"""The bundled 12-image set in a folder of its own, and the smallest training that touches everything."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import train
from utils.errors import run_cli
from utils.files import ROOT


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """data.yaml of a private copy of data/tiny: caches and damage stay in the test's folder."""
    folder = tmp_path / "tiny"
    shutil.copytree(ROOT / "data" / "tiny", folder, ignore=shutil.ignore_patterns("*.npz"))
    text = "path: .\ntrain: images/train\nval: images/val\nnames: [nine, ten, jack, queen, king, ace]\n"
    (folder / "data.yaml").write_text(text)
    return folder / "data.yaml"


@pytest.fixture
def train_cli(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Run train.py's main as the command line would: (exit status, stdout, stderr)."""

    def call(*flags: str, data: Path | str = tiny, base: Sequence[str] | None = None) -> tuple[int, str, str]:
        if base is None:
            base = ["--cfg", "yolov5n.yaml", "--weights", "", "--img", "64", "--batch", "4", "--epochs", "1"]
            base += ["--workers", "0", "--device", "cpu", "--project", str(tmp_path / "runs"), "--noplots"]
        argv = [*base, "--data", str(data), *flags] if data else [*base, *flags]
        capsys.readouterr()
        status = run_cli(train.main, argv)
        out, err = capsys.readouterr()
        return status, out, err

    return call
