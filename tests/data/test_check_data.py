"""The report before training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from utils.check_data import dataset_report, print_report
from utils.config import DataConfig

ROW = "0 .5 .5 .2 .2\n"


def test_report(make_set: Callable) -> None:
    train = make_set({"a": ROW + "1 .5 .5 .5 .25\n", "b": ROW, "c": "", "d": "9 .5 .5 .1 .1\n" + ROW})
    val = make_set({"e": ROW, "f": ROW}, split="val", size=(64, 64))
    shutil.copy(train / "a.png", val / "copy.png")
    shutil.copy(train / "b.png", train / "again.png")
    names = {0: "cell", 1: "platelet", 2: "ghost"}
    text = dataset_report({"train": [train], "val": [val], "test": [train.parent / "nowhere"]}, names, 640)
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert "5 usable images in " + str(train).replace("images", "labels") in lines
    assert "4 images, 2 backgrounds, 0 corrupt, 1 bad rows dropped" in lines
    assert {"0 cell 3 3", "1 platelet 1 1", "2 ghost 0 0 <- none"} <= lines
    assert "image sizes: 60x40" in lines
    assert any(line.startswith("box side sqrt(w*h) at 640 px, 5/25/50/75/95 percent: 104.5") for line in lines)
    assert f"{str(train).replace('images', 'labels')}/d.txt:1: class 9 but the data set has 3 names (0..2)" in lines
    assert f"cannot be used: {train.parent}/nowhere: no such folder or file" in lines
    assert "1 group of equal images across splits (scores will look better than they are):" in lines
    assert f"{train}/a.png = {val}/copy.png" in lines
    assert f"{train}/again.png = {train}/b.png" in lines or f"{train}/b.png = {train}/again.png" in lines


def test_one_folder_for_two_splits_is_said_once(make_set: Callable, tmp_path: Path) -> None:
    images = make_set({"a": ROW, "b": ROW})
    text = dataset_report({"train": [images], "val": [images]}, {0: "x"})
    assert text.count("train and val share files") == 1 and "across splits" not in text


def test_exit_status_tells_of_faults(make_set: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = make_set({"a": ROW})
    data = DataConfig(tmp_path / "d.yaml", tmp_path, (images,), (images,), (), {0: "cell"})
    assert print_report(data) == 0 and "cell" in capsys.readouterr().out
    make_set({"b": ROW + "nonsense\n"})
    assert print_report(data) == 1 and "b.txt:2" in capsys.readouterr().out
