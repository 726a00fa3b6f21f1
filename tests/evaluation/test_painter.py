"""Diagrams drawn by other processes: the same files, and one line for what cannot be drawn."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import pytest

from utils import curves
from utils.errors import ResourceError
from utils.painter import Painters, read_job, write_job

LABELS = np.array([[0, 0.5, 0.5, 0.2, 0.1], [1, 0.2, 0.3, 0.1, 0.1]], np.float32)


def test_what_is_sent_arrives() -> None:
    file = io.BytesIO()
    first = (LABELS, {0: "a", 1: "größe"}, Path("x/labels.jpg"), [1, 2.5, float("inf")])
    write_job(file, "plot_labels", first)
    write_job(file, "plot_results", ({"epoch": [0], "loss": [np.float64(0.5)]}, "y"))
    write_job(file, "", ())
    file.seek(0)
    name, (labels, *others) = read_job(file)
    assert name == "plot_labels" and np.array_equal(labels, LABELS) and labels.dtype == np.float32
    assert others == [{0: "a", 1: "größe"}, "x/labels.jpg", [1, 2.5, float("inf")]]
    assert read_job(file) == ("plot_results", [{"epoch": [0], "loss": [0.5]}, "y"])
    assert read_job(file) is None and read_job(file) is None


def test_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths are those of the program, which may change nothing about where it is."""
    monkeypatch.chdir(tmp_path)
    with Painters(cores=8) as painters:
        painters.draw("plot_labels", LABELS, {0: "a", 1: "b"}, Path("other.png"))
        painters.draw("plot_confidence_curve", np.linspace(0, 1, 9), np.ones((1, 9)), ["a"], "curve.png", "F1")
    curves.plot_labels(LABELS, {0: "a", 1: "b"}, "own.png")
    assert Path("other.png").read_bytes() == Path("own.png").read_bytes()
    assert Path("curve.png").is_file()


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    painters = Painters(cores=1)
    painters.draw("plot_labels", LABELS, {0: "a", 1: "b"}, tmp_path / "no such folder" / "labels.png")
    painters.draw("plot_labels", LABELS, {0: "a", 1: "b"}, tmp_path / "labels.png")
    with pytest.raises(ResourceError, match="no such folder/labels.png: the picture cannot be written"):
        painters.close()
    assert (tmp_path / "labels.png").is_file()


def test_painters_end_with_a_run_that_fails(tmp_path: Path) -> None:
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt), Painters(cores=8) as painters:
        for number in range(50):
            painters.draw("plot_labels", LABELS, {0: "a"}, tmp_path / f"{number}.png")
        raise KeyboardInterrupt
    assert all(painter.process.returncode for painter in painters._painters)
    assert time.perf_counter() - start < 5


def test_a_painter_that_was_killed(tmp_path: Path) -> None:
    painters = Painters(cores=1)
    painters._painters[0].process.kill()
    painters._painters[0].process.wait()
    painters.draw("plot_labels", LABELS, {0: "a", 1: "b"}, tmp_path / "labels.png")
    with pytest.raises(ResourceError, match="a painter ended with status -9"):
        painters.close()
