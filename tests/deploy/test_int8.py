"""ONNX in eight bits: what is quantised and what is not, the same objects, one line for what cannot be."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

import detect
import export
import val
from deploy.checking import BARELY, Agreement, agreement, refuse_if_other
from deploy.runtime import open_runtime
from utils.errors import ConfigError, DataError, ExportError, run_cli

CELLS = Path(__file__).resolve().parents[2] / "data" / "bccd.yaml"


@pytest.fixture(scope="module")
def int8(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """yolov5n-dcn in eight bits, for any size."""
    settings = {"imgsz": 256, "dynamic": True, "data": str(CELLS), "output": str(tmp_path_factory.mktemp("int8"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "CALIBRATED_ON", 24)
        [path] = export.run(weights=str(weights), int8=True, **settings)
    return path


def test_the_backbone_is_in_eight_bits_and_the_rest_is_not(int8: Path, weights: Path) -> None:
    assert int8.name == "cells_int8.onnx" and int8.stat().st_size < 0.75 * weights.stat().st_size
    graph = onnx.load(int8).graph
    made_by = {value: node for node in graph.node for value in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    floats = [node for node in convolutions if node.input[1] not in made_by]  # the weight is there as it is
    deformable = [node for node in graph.node if node.op_type == "DeformConv"]
    assert len(floats) == 3 + len(deformable) and len(convolutions) - len(floats) > 40  # heads, and offsets
    offsets = [made_by[made_by[node.input[2]].input[0]] for node in deformable]  # by a Slice
    assert deformable and all(node.op_type == "Conv" and node.input[1] not in made_by for node in offsets)


def test_map_is_nearly_that_of_the_checkpoint(int8: Path, weights: Path, tmp_path: Path) -> None:
    settings = {"data": str(CELLS), "imgsz": 256, "batch_size": 6, "workers": 0, "noplots": True, "device": "cpu"}
    floats, whole = (val.run(weights=str(w), project=str(tmp_path), **settings) for w in (weights, int8))
    assert floats.map50 > 0.3 and abs(whole.map50 - floats.map50) < 0.02
    assert open_runtime(int8, torch.device("cpu")).meta.int8


def test_detect_runs_it_and_suppression_may_be_inside(weights: Path, tmp_path: Path) -> None:
    settings = {"imgsz": 256, "data": str(CELLS), "output": str(tmp_path), "nms": True}
    [path] = export.run(weights=str(weights), int8=True, **settings)
    source = str(sorted((CELLS.parent / "bccd" / "images" / "val").glob("*.jpg"))[0])
    assert detect.main(["--weights", str(path), "--source", source, "--project", str(tmp_path), "--save-txt"]) == 0
    assert len((tmp_path / "exp" / "labels" / Path(source).with_suffix(".txt").name).read_text().splitlines()) > 3


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ([], ConfigError, "--int8: needs --data"),
        (["--data", str(CELLS), "--half"], ConfigError, "--int8 and --half: choose one"),
        (["--data", str(CELLS), "--include", "onnx", "torchscript"], ConfigError, "leave out --include torchscript"),
        (["--data", "nowhere.yaml"], DataError, "nowhere.yaml: no such file"),
    ],
)
def test_wrong_flags_are_told_before_anything_is_written(
    flags: list[str], error: type, message: str, weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export.main(["--weights", str(weights), "--int8", "--imgsz", "64", "--output", str(tmp_path), *flags])
    assert not list(tmp_path.iterdir())


def test_pictures_that_cannot_be_read_are_left_out(weights: Path, tmp_path: Path, caplog) -> None:
    """Like in a training; without any there is nothing to calibrate on, and no file in floats under the usual name."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "torn.jpg").write_bytes(b"\xff\xd8\xff torn")
    (tmp_path / "data.yaml").write_text("train: images\nval: images\nnames: [a, b, c]\n")
    flags = ["--weights", str(weights), "--int8", "--imgsz", "64", "--output", str(tmp_path / "out")]
    with pytest.raises(DataError, match=r"data\.yaml: its training split has no picture to calibrate on"):
        export.main([*flags, "--data", str(tmp_path / "data.yaml")])
    assert "torn.jpg" in caplog.text and "--int8 does without it" in caplog.text and not (tmp_path / "out").exists()
    for number, picture in enumerate(sorted((CELLS.parent / "bccd" / "images" / "train").glob("*.jpg"))[:3]):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(picture.read_bytes())
    flags = [*flags[:-4], "--imgsz", "256", "--batch-size", "2", "--output", str(tmp_path / "out")]
    assert export.main([*flags, "--data", str(tmp_path / "data.yaml")]) == 0  # in batches of two, the last half full
    assert "on 3 pictures of the data set" in caplog.text and "has other classes than the model" in caplog.text


def decoded(*rows: tuple[float, ...]) -> torch.Tensor:
    """(1, N, 6) predictions of one class: cx, cy, w, h, confidence, and a probability of 1."""
    return torch.tensor([[(*row, 1.0) for row in rows]])


def test_objects_that_a_file_misses_or_makes_up_are_counted() -> None:
    boxes = [(40.0 + 100 * n, 50.0, 40.0, 40.0) for n in range(5)]
    model = decoded(*((*box, 0.9) for box in boxes[:3]), (*boxes[3], 0.26))  # the last just passes: it does not count
    near = (boxes[0][0] + 2, *boxes[0][1:])
    file = decoded((*near, 0.8), (*boxes[1], 0.25 - BARELY / 2), (*boxes[4], 0.7), (*boxes[3], 0.9))
    seen = agreement(model, file, 0.25, 0.45)
    assert seen == Agreement(pictures=1, objects=3, found=2, others=1)  # 3 is there in both, if barely in one
    assert seen + seen == Agreement(2, 6, 4, 2)
    assert seen.text() == "finds 2 of the 3 objects that PyTorch finds on 1 picture of the data set, and 1 besides"


def test_classes_that_reach_the_files_limit_are_passed_over() -> None:
    boxes = [(40.0 + 100 * n, 50.0, 40.0, 40.0, 0.9 - n / 100) for n in range(5)]
    assert agreement(decoded(*boxes), decoded(*boxes[:3]), 0.25, 0.45, 3) == Agreement(1, 0, 0, 0)
    assert agreement(decoded(*boxes), decoded(*boxes[:3]), 0.25, 0.45, 4) == Agreement(1, 5, 3, 0)
    assert agreement(decoded(*boxes), decoded(*boxes), 0.01, 0.45) == Agreement(1, 5, 5, 0)


def test_a_model_that_finds_nothing_cannot_be_compared() -> None:
    with pytest.raises(ExportError, match="finds nothing on 32 pictures"):
        refuse_if_other(Agreement(32))


@pytest.mark.parametrize(
    ("objects", "found", "others", "fine"),
    [
        (100, 90, 10, True),
        (100, 89, 0, False),
        (100, 100, 11, False),
        (8, 6, 2, True),
        (8, 5, 0, False),
        (2, 0, 0, False),
    ],
)
def test_a_file_that_finds_something_else_is_refused(objects: int, found: int, others: int, fine: bool) -> None:
    seen = Agreement(8, objects, found, others)
    if fine:
        refuse_if_other(seen)
    else:
        with pytest.raises(ExportError, match="does not find what the model does: finds"):
            refuse_if_other(seen)


def test_one_line_from_the_command_line(weights: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_cli(export.main, ["--weights", str(weights), "--int8"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
