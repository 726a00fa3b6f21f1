"""export.py: forms of ONNX, compiled packages, what goes wrong, and that nothing is left half-written."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import deploy.exporter
import deploy.formats
import export
import gen_wts
from deploy.checking import difference, input_batch
from deploy.contract import Runtime
from deploy.exporter import export as write
from deploy.exporter import prepare
from deploy.formats import BY_NAME
from deploy.metadata import describe, parse
from deploy.runtime import open_runtime
from models.loading import load_model
from models.yolo import DetectionModel
from tests.deploy.conftest import TINY, saved
from utils.errors import ConfigError, ExportError, run_cli
from utils.nms import non_max_suppression

onnx = pytest.importorskip("onnx")  # lent GPU machines, where only the gpu tests run, have none of these packages
onnxruntime = pytest.importorskip("onnxruntime")


def run(*argv: object) -> int:
    return run_cli(export.main, [str(word) for word in argv])


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


# -- ONNX -------------------------------------------------------------------------------------------------------------


def test_onnx_from_grid_sample_in_float16(tiny: Path, make_job, picture: np.ndarray, tmp_path: Path) -> None:
    path = write(make_job(tiny, dcn="gridsample", half=True, batch=2, folder=tmp_path), BY_NAME["onnx"])
    kinds = operators(path)
    assert kinds["GridSample"] == 2 and not kinds["DeformConv"]
    assert onnx.load(path).opset_import[0].version == 18
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(float16)", [2, 3, 96, 128])
    assert session.get_outputs()[0].type == "tensor(float)"
    images = input_batch(picture, (96, 128), 2, torch.device("cpu"))
    with torch.no_grad():
        expected = load_model(tiny)(images)[0]
    far = difference(expected, open_runtime(path)(images)[0])
    assert 0 < far.relative < 1e-2 and far.score < 1e-2


def test_onnx_for_any_size_and_batch(tiny: Path, make_job, tmp_path: Path) -> None:
    path = write(make_job(tiny, dynamic=True, folder=tmp_path), BY_NAME["onnx"])
    graph = onnx.load(path).graph
    shapes = [each[0].type.tensor_type.shape.dim for each in (graph.input, graph.output)]
    given, found = ([dim.dim_param or dim.dim_value for dim in dims] for dims in shapes)
    assert (given, found) == (["batch", 3, "height", "width"], ["batch", "boxes", 8])
    model, runtime = load_model(tiny), open_runtime(path)
    for shape in ((1, 3, 64, 64), (3, 3, 32, 160)):
        images = torch.rand(shape)
        with torch.no_grad():
            assert difference(model(images)[0], runtime(images)[0]).relative < 1e-3


def test_sampling_is_in_float32_inside_a_float16_file(tiny: Path, make_job, tmp_path: Path) -> None:
    path = write(make_job(tiny, half=True, folder=tmp_path), BY_NAME["onnx"])
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    kinds = {each.name: each.type.tensor_type.elem_type for each in [*graph.value_info, *graph.input, *graph.output]}
    kinds |= {each.name: each.data_type for each in graph.initializer}
    layers = [node for node in graph.node if node.op_type == "DeformConv"]
    assert len(layers) == 2
    assert {kinds[name] for node in layers for name in node.input} == {onnx.TensorProto.FLOAT}
    assert onnx.TensorProto.FLOAT16 in {kinds[node.output[0]] for node in graph.node if node.op_type == "Conv"}


def test_suppression_inside(tiny: Path, make_job, picture: np.ndarray, tmp_path: Path) -> None:
    options = {"nms": True, "conf": 0.3, "iou": 0.4, "max_det": 300, "batch": 2}
    path = write(make_job(tiny, folder=tmp_path, **options), BY_NAME["onnx"])
    images = input_batch(picture, (96, 128), 2, torch.device("cpu"))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_outputs()] == ["detections"]
    (rows,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = non_max_suppression(load_model(tiny)(images)[0], 0.3, 0.4)
    assert min(map(len, expected)) > 3
    for image, boxes in enumerate(expected):
        own = torch.from_numpy(rows[rows[:, 0] == image][:, 1:])
        own = own[own[:, 4].argsort(descending=True)]
        torch.testing.assert_close(own, boxes, rtol=1e-3, atol=1e-3)
    # and through the runtime, where a second suppression changes nothing
    again = non_max_suppression(open_runtime(path)(images)[0], 0.3, 0.4)
    for own, boxes in zip(again, expected):
        torch.testing.assert_close(own, boxes, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--opset", 18], "--opset 18: --dcn deformconv needs 19 to 23"),
        (["--opset", 17, "--dcn", "gridsample"], "--opset 17: --dcn gridsample needs 18 to 23"),
        (["--img", 100], "--imgsz 100 100: not multiples of the stride 32"),
        (["--img", 64, 64, 64], "expected one size or height and width"),
        (["--batch-size", 0], "--batch-size 0"),
        (["--include", "onx"], "--include onx: no such format, did you mean 'onnx'? (see export.py --list)"),
        (["--include", "wts", "--nms"], "--nms: goes into ONNX files only"),
        (["--include", "ncnn", "--dynamic"], "--include ncnn: runs one image of one size"),
        (["--include", "wts", "onnx", "ncnn", "--dynamic"], "--include ncnn: runs one image of one size"),
        (["--include", "wts", "onnx", "--dcn", "fused"], "--dcn fused: not in onnx here"),
        (["--image", "nowhere.jpg"], "nowhere.jpg"),
        (["--conf-thres", 2], "--conf-thres"),
        (["--int8"], "--int8: needs --data YAML"),
        (["--dcm", "gridsample"], "--dcm: no such flag, did you mean '--dcn'?"),
    ],
)
def test_wrong_flags_are_one_line(
    flags: list, message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run("--weights", tiny, "--img", 64, "--output", tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert list(tmp_path.iterdir()) == []


# -- torch ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_package(make_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[-1, 1, "Conv", [8, 6, 2, 2]], [-1, 1, "DCN", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]]]  # g++ takes its time
    spec = {**TINY, "anchors": TINY["anchors"][:1], "backbone": rows, "head": [[[2], 1, "Detect", ["nc", "anchors"]]]}
    weights = saved(DetectionModel(spec), tmp_path / "small.pt")
    path = write(make_job(weights, batch=2), BY_NAME["aoti"])
    runtime = open_runtime(path)
    assert runtime.names == {0: "red", 1: "white", 2: "platelet"} and runtime.meta.dcn == "gridsample"
    images = torch.rand(3, 3, 96, 128)
    with torch.no_grad():
        assert difference(load_model(weights)(images)[0], runtime(images)[0]).relative < 1e-3


def test_float16_torchscript_keeps_its_weights_when_the_detector_asks_for_float32(
    tiny: Path, make_job, tmp_path: Path
) -> None:
    runtime = open_runtime(write(make_job(tiny, half=True, folder=tmp_path), BY_NAME["torchscript"]))
    images = torch.rand(1, 3, 96, 128)
    assert torch.equal(runtime.float()(images)[0], runtime(images)[0])


# -- the command line -------------------------------------------------------------------------------------------------


def test_list_says_what_is_there_and_what_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(deploy.formats, "is_installed", lambda module: module != "ncnn")
    assert run("--list") == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(rows) == {"--include", *BY_NAME}
    assert "no: pip install ncnn " in rows["ncnn"]
    assert "  yes  " in rows["wts"] and "  yes  " in rows["onnx"]


def test_a_missing_package_is_one_line_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tiny: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(deploy.formats, "is_installed", lambda module: module != "onnxscript")
    assert run("--weights", tiny, "--output", tmp_path) == 2
    assert capsys.readouterr().err == (
        "error: --include onnx needs a package that is not installed: pip install onnxscript\n"
    )


def test_several_formats_in_a_new_folder(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    formats = ("torchscript", "wts", "torchscript")
    assert run("--weights", tiny, "--include", *formats, "--img", 64, "--output", folder) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["tiny.torchscript", "tiny.wts"]


def test_export_from_wts(tiny: Path, tmp_path: Path) -> None:
    assert run_cli(gen_wts.main, ["-w", str(tiny), "-o", str(tmp_path / "t.wts")]) == 0
    assert run("--weights", tmp_path / "t.wts", "--include", "torchscript", "--img", 64) == 0
    assert open_runtime(tmp_path / "t.torchscript").names[0] == "red"
    assert run("--weights", tmp_path / "t.wts", "--include", "wts") == 2  # it would replace itself


def test_weights_that_are_no_checkpoint(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.onnx").touch()
    assert run("--weights", tmp_path / "a.onnx") == 2
    assert "export starts from a checkpoint" in capsys.readouterr().err
    assert run("--weights", tmp_path / "b.pt") == 2
    assert "b.pt: no such file" in capsys.readouterr().err


class Wrong(Runtime):
    """A runtime that moves every box by a pixel."""

    def __init__(self, right: Runtime) -> None:
        super().__init__(right.meta, right.source)
        self._right = [right]

    def run(self, images: torch.Tensor) -> torch.Tensor:
        moved = self._right[0].run(images).clone()
        moved[..., 0] += 1
        return moved


def test_a_file_that_computes_something_else_gets_no_name(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(deploy.exporter, "open_runtime", lambda path, device: Wrong(open_runtime(path, device)))
    (tmp_path / "tiny.torchscript").write_text("the older file")
    assert run("--weights", tiny, "--include", "torchscript", "--img", 64, "--output", tmp_path) == 2
    error = capsys.readouterr().err
    assert "does not compute what the model does: largest difference to PyTorch 1 px" in error
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.torchscript"]
    assert (tmp_path / "tiny.torchscript").read_text() == "the older file"


def test_a_converter_that_fails_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(_model, _example, path: Path, _meta) -> None:
        path.write_text("half of it")
        raise NotImplementedError("no such operator\nand more lines")

    monkeypatch.setattr(deploy.exporter, "export_torchscript", fail)
    assert run("--weights", tiny, "--include", "torchscript", "--img", 64, "--output", tmp_path) == 2
    error = capsys.readouterr().err
    assert "torchscript cannot hold this model (NotImplementedError: no such operator)" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert run("--weights", tiny, "--include", "wts", "--output", tmp_path / "file") == 2
    assert "use --output" in capsys.readouterr().err
    if os.geteuid() == 0:
        return  # root writes everywhere
    tmp_path.chmod(0o500)
    assert run("--weights", tiny, "--include", "wts", "--output", tmp_path) == 2
    assert "use --output" in capsys.readouterr().err


def test_an_older_folder_is_replaced(tiny: Path, make_job, tmp_path: Path) -> None:
    older = tmp_path / "tiny_ncnn_model"
    older.mkdir()
    (older / "stale").touch()
    assert write(make_job(tiny, folder=tmp_path), BY_NAME["ncnn"]) == older
    assert sorted(path.name for path in older.iterdir()) == ["metadata.json", "model.ncnn.bin", "model.ncnn.param"]
    assert [path.name for path in tmp_path.iterdir()] == [older.name]


def test_a_model_without_dcn_needs_no_form(make_job, tmp_path: Path) -> None:
    rows = [[source, count, kind.replace("DCN", "Conv") if kind == "DCN" else "C3" if kind == "C3DCN" else kind, args]
            for source, count, kind, args in TINY["backbone"]]  # fmt: skip
    model = DetectionModel({**TINY, "backbone": rows})
    path = write(make_job(saved(model, tmp_path / "p.pt"), dcn="gridsample"), BY_NAME["torchscript"])
    assert open_runtime(path).meta.dcn == ""


def test_an_activation_with_a_backward_pass_of_its_own(make_job, tmp_path: Path) -> None:
    model = DetectionModel({**TINY, "activation": "nn.MemoryEfficientMish"})
    path = write(make_job(saved(model, tmp_path / "mish.pt")), BY_NAME["torchscript"])
    assert open_runtime(path).nc == 3


# -- what travels -----------------------------------------------------------------------------------------------------


def test_metadata_comes_back(tiny: Path) -> None:
    meta = describe(prepare(tiny, deploy.exporter.ExportOptions(imgsz=(64, 96))).plain, (64, 96), nms=7, half=True)
    assert parse(meta.entries(), "a.onnx") == meta


@pytest.mark.parametrize(
    "change",
    [
        {"names": "[]"},
        {"names": "[1, 2]"},
        {"names": "{"},
        {"stride": "0"},
        {"stride": "true"},
        {"strides": '["8"]'},
        {"imgsz": "[64]"},
        {"imgsz": "[64, 1e9]"},
        {"batch": "0"},
        {"nms": "-1"},
        {"nms": "999999999"},
        {"half": "1"},
        {"format": "2"},
        {"names": None},
    ],
)
def test_metadata_of_strangers_is_checked(change: dict, tiny: Path) -> None:
    entries = describe(prepare(tiny, deploy.exporter.ExportOptions()).plain, (64, 64)).entries()
    with pytest.raises(ExportError, match="a.onnx"):
        parse({key: value for key, value in {**entries, **change}.items() if value is not None}, "a.onnx")


def test_class_names_of_strangers_are_shown_not_obeyed(tiny: Path) -> None:
    entries = describe(prepare(tiny, deploy.exporter.ExportOptions()).plain, (64, 64)).entries()
    assert "\x1b" not in parse({**entries, "names": '["\\u001b[31m"]'}, "a.onnx").names[0]


def test_run_from_python(tiny: Path, tmp_path: Path) -> None:
    written = export.run(weights=str(tiny), include=["torchscript"], imgsz=64, output=str(tmp_path))
    assert written == [tmp_path / "tiny.torchscript"]
    with pytest.raises(ConfigError, match="imgz"):
        export.run(weights=str(tiny), imgz=64)
