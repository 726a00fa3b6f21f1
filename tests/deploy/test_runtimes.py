"""Exported files run like the checkpoint they came from: the same numbers, the same mAP, the same detections."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import detect
import val
from deploy.checking import difference
from deploy.contract import Runtime
from deploy.exporter import export
from deploy.formats import BY_NAME, FORMATS
from deploy.metadata import Metadata
from deploy.runtime import open_model, open_runtime
from deploy.wrap import quiet
from models.loading import load_model
from tests.deploy.conftest import CELLS
from utils.errors import CheckpointError, ConfigError, ExportError, run_cli
from utils.files import EXPORTED_MODELS

CPU = torch.device("cpu")
FREE, FIXED = ("torchscript", "openvino"), ("onnx", "ncnn")
"""Formats of which a file for any size, or for one, is made here; ONNX for any size takes longer and is tested with the
tiny model (test_export.py)."""


@pytest.fixture(scope="session")
def files(weights: Path, make_job, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """yolov5n-dcn in every format that takes a few seconds."""
    folder = tmp_path_factory.mktemp("exported")
    free = make_job(weights, imgsz=(256, 256), dynamic=True, folder=folder)
    fixed = make_job(weights, imgsz=(256, 256), folder=folder)
    return {name: export(free if name in FREE else fixed, BY_NAME[name]) for name in (*FREE, *FIXED)}


@pytest.fixture(scope="session")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 12 of the bundled validation pictures."""
    root = tmp_path_factory.mktemp("cells")
    for kind, suffix in (("images", ".jpg"), ("labels", ".txt")):
        (root / kind).mkdir()
        for picture in sorted(CELLS.glob("*.jpg"))[:12]:
            source = CELLS.parents[1] / kind / "val" / f"{picture.stem}{suffix}"
            shutil.copy(source, root / kind / source.name)
    data = root / "cells.yaml"
    data.write_text(f"path: {root}\ntrain: images\nval: images\nnames: [RBC, WBC, Platelets]\n")
    return data


def measured(weights: Path, data: Path, folder: Path) -> np.ndarray:
    """mAP50 and mAP50-95, overall and for each class."""
    settings = {"imgsz": 256, "batch_size": 6, "workers": 0, "noplots": True, "device": "cpu"}
    metrics = val.run(weights=str(weights), data=str(data), project=str(folder), **settings)
    return np.array([metrics.map50, metrics.map, *metrics.per_class.ap.mean(1)])


@pytest.fixture(scope="session")
def map_of_the_checkpoint(weights: Path, cells: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    found = measured(weights, cells, tmp_path_factory.mktemp("val"))
    assert found[0] > 0.5  # it has learned something, so that equality says something
    return found


@pytest.mark.parametrize("name", FREE)
def test_map_is_that_of_the_checkpoint(
    name: str, files: dict[str, Path], cells: Path, map_of_the_checkpoint: np.ndarray, tmp_path: Path
) -> None:
    np.testing.assert_allclose(measured(files[name], cells, tmp_path), map_of_the_checkpoint, atol=1e-3)


@pytest.mark.parametrize("name", FIXED)
def test_map_of_a_file_of_one_size_is_that_of_the_checkpoint_on_squares(
    name: str, weights: Path, files: dict[str, Path], cells: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measured(files[name], cells, tmp_path)
    monkeypatch.setattr(val, "only_size", lambda _args, _model: 256)
    np.testing.assert_allclose(found, measured(weights, cells, tmp_path), atol=1e-3)


@pytest.mark.parametrize("name", [*FREE, *FIXED])
def test_detect_writes_the_same_boxes(name: str, weights: Path, files: dict[str, Path], tmp_path: Path) -> None:
    rows = []
    for path in (weights, files[name]):
        size = ["--imgsz", "256", "256"] if name in FIXED else ["--imgsz", "256"]
        argv = ["--weights", str(path), "--source", str(sorted(CELLS.glob("*.jpg"))[3]), "--save-txt", "--save-conf"]
        folder = tmp_path / path.name
        assert run_cli(detect.main, [*argv, *size, "--nosave", "--device", "cpu", "--project", str(folder)]) == 0
        (labels,) = (folder / "exp" / "labels").iterdir()
        rows.append(sorted(labels.read_text().splitlines()))
    if name in FIXED:  # the checkpoint was shown a rectangle
        assert len(rows[0]) > 5 and abs(len(rows[0]) - len(rows[1])) <= 2
        return
    expected, found = (np.array([list(map(float, row.split())) for row in each]) for each in rows)
    assert len(expected) > 5
    np.testing.assert_allclose(found, expected, atol=4e-3)  # boxes are rounded to whole pixels of 640


@pytest.mark.parametrize("name", [*FREE, *FIXED])
def test_what_travels_in_the_file(name: str, files: dict[str, Path]) -> None:
    runtime = open_runtime(files[name])
    assert runtime.names == {0: "RBC", 1: "WBC", 2: "Platelets"}
    assert runtime.nc == 3
    assert runtime.stride.tolist() == [8, 16, 32]
    assert runtime.meta.stride == 32
    assert runtime.meta.version and runtime.meta.dcn == "deformconv"
    assert runtime.imgsz == ((256, 256) if name in FIXED else None)
    assert list(runtime.parameters()) == []


def test_onnx_metadata_reads_as_json_in_onnx_itself(files: dict[str, Path]) -> None:
    onnx = pytest.importorskip("onnx")
    proto = onnx.load(files["onnx"])
    entries = {entry.key: entry.value for entry in proto.metadata_props}
    assert entries["names"] == '["RBC", "WBC", "Platelets"]' and entries["stride"] == "32"
    assert proto.opset_import[0].version == 19
    assert sum(node.op_type == "DeformConv" for node in proto.graph.node) == 3
    assert "/work" not in str(proto.graph.node[0]) and not proto.graph.node[0].metadata_props


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_any_size_and_batch(name: str, size: tuple[int, int], files: dict[str, Path], weights: Path) -> None:
    images = torch.rand(3, 3, *size)
    with torch.no_grad():
        expected = load_model(weights)(images)[0]
    found, raw = open_runtime(files[name])(images)
    assert raw is None
    assert difference(expected, found).relative < 1e-3


def test_a_file_of_one_size_and_batch_takes_any_number_of_images(tiny: Path, make_job, tmp_path: Path) -> None:
    path = export(make_job(tiny, batch=2, folder=tmp_path), BY_NAME["torchscript"])
    runtime = open_runtime(path)
    images = torch.rand(5, 3, 96, 128)
    with torch.no_grad():
        expected = load_model(tiny)(images)[0]
    assert difference(expected, runtime(images)[0]).relative < 1e-3
    with pytest.raises(ConfigError, match="takes images of 96x128, not 64x64"):
        runtime(torch.rand(1, 3, 64, 64))


def test_numbers_of_images_that_fill_no_batch(tiny: Path, make_job, tmp_path: Path) -> None:
    runtime = open_runtime(export(make_job(tiny, batch=3, folder=tmp_path), BY_NAME["torchscript"]))
    shapes = []
    run = runtime.run

    def counted(images: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(images.shape))
        return run(images)

    runtime.run = counted
    assert len(runtime(torch.rand(4, 3, 96, 128))[0]) == 4
    assert shapes == [(3, 3, 96, 128)] * 2


class Fake(Runtime):
    """Says what it is told to say, gives what it is told to give."""

    def __init__(self, output: torch.Tensor, nms: int = 0) -> None:
        super().__init__(Metadata(("a", "b"), 32, (8.0,), (32, 32), dynamic=True, nms=nms), Path("fake.onnx"))
        self._output = output

    def run(self, images: torch.Tensor) -> torch.Tensor:
        return self._output


@pytest.mark.parametrize("shape", [(1, 10, 8), (2, 10, 7), (10, 7), (1, 7, 10)])
def test_a_file_that_gives_something_else_than_it_says(shape: tuple[int, ...]) -> None:
    with pytest.raises(ExportError, match="fake.onnx: gives .* expected"):
        Fake(torch.rand(shape))(torch.rand(1, 3, 32, 32))


def test_files_with_suppression_inside_say_so() -> None:
    assert Fake(torch.rand(0, 7), nms=3).suppresses and not Fake(torch.rand(1, 10, 7)).suppresses


def test_detections_of_classes_that_are_not_there() -> None:
    rows = torch.tensor([[0, 1, 1, 5, 5, 0.9, 1.0], [0, 1, 1, 5, 5, 0.9, 2.0]])
    assert Fake(rows[:1], nms=3)(torch.rand(1, 3, 32, 32))[0].shape == (1, 6, 7)
    with pytest.raises(ExportError, match="expected 2 classes"):
        Fake(rows, nms=3)(torch.rand(1, 3, 32, 32))
    with pytest.raises(ExportError, match="expected"):
        Fake(rows[:, :6], nms=3)(torch.rand(1, 3, 32, 32))


def test_one_exported_file_at_a_time(files: dict[str, Path], weights: Path) -> None:
    with pytest.raises(ConfigError, match="only checkpoints make an ensemble"):
        open_model([str(weights), str(files["onnx"])], CPU)
    with pytest.raises(ConfigError, match="--cfg"):
        open_model([str(files["onnx"])], CPU, "yolov5n.yaml")
    assert not isinstance(open_model([str(weights)], CPU), Runtime)


@pytest.mark.parametrize("flag", ["--visualize", "--update"])
def test_flags_that_need_a_checkpoint(flag: str, files: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    assert run_cli(detect.main, ["--weights", str(files["onnx"]), flag]) == 2
    assert f"error: {flag}: works on checkpoints" in capsys.readouterr().err


def test_study_needs_a_file_for_any_size(
    files: dict[str, Path], cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["--weights", str(files["ncnn"]), "--data", str(cells), "--task", "study", "--device", "cpu"]
    assert run_cli(val.main, [*argv, "--project", str(tmp_path)]) == 2
    assert "takes one image size" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_where_a_checkpoint_is_needed(files: dict[str, Path]) -> None:
    for path in files.values():
        assert path.name.endswith(EXPORTED_MODELS)
        with pytest.raises(CheckpointError, match="an exported model: val.py, detect.py"):
            load_model(path)


def test_the_two_lists_of_suffixes_agree() -> None:
    assert set(EXPORTED_MODELS) == {each.suffix for each in FORMATS if each.runs}


BAD = {
    "a.onnx": b"not a model",
    "a.torchscript": b"not a model",
    "a.pt2": b"not a model",
    "a.engine": b"not a model",
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_files_are_one_line(name: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / name).write_bytes(BAD[name])
    assert run_cli(detect.main, ["--weights", str(tmp_path / name), "--project", str(tmp_path / "runs")]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and name in errors[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["a_openvino_model", "a_ncnn_model"])
def test_folders_that_hold_no_model_are_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / name).mkdir()
    assert run_cli(detect.main, ["--weights", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / name}: ")


def test_files_that_are_not_of_export_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with quiet():
        torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.rand(1, 3, 8, 8)), str(tmp_path / "a.torchscript"))
    assert run_cli(detect.main, ["--weights", str(tmp_path / "a.torchscript")]) == 2
    assert "holds no class names, stride and size" in capsys.readouterr().err


def test_an_onnxruntime_without_deformconv_is_told_what_to_do(files, monkeypatch) -> None:
    def refuse(*arguments, **settings):
        raise RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find DeformConv(19)\nand more")

    monkeypatch.setattr("onnxruntime.InferenceSession", refuse)
    with pytest.raises(ExportError, match=r"DeformConv\(19\); a newer onnxruntime has it, or --dcn gridsample\)$"):
        open_runtime(files["onnx"])
