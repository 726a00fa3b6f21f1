"""python -m deploy.tensorrt: engines built for real, without a GPU; the same network as ONNX run; wrong input."""

from __future__ import annotations

import contextlib
import importlib
import json
import types
from pathlib import Path

import pytest
import torch

import detect
import export
import gen_wts
from deploy.metadata import describe
from deploy.runtime import open_runtime
from deploy.tensorrt.build import load_sized
from deploy.tensorrt.engine_file import Maker, pack_engine, read_engine
from deploy.tensorrt.network import describe_network
from deploy.tensorrt.sizes import SIZES, layers_of, size_of
from deploy.tensorrt.trt_backend import EngineOptions, TensorRtNetwork, load_tensorrt
from deploy.to_wts import wts_tensors
from models.loading import read_any_weights
from models.yolo import DetectionModel
from tests.deploy.conftest import CELLS
from tests.deploy.trt_interpreter import needs_wheel
from utils.errors import ConfigError, ExportError, run_cli
from utils.wts import write_wts

program = importlib.import_module("deploy.tensorrt.__main__")
pytestmark = needs_wheel
CARDS = (75, 80, 86, 89, 120, 121)


@pytest.fixture(scope="module")
def wts(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """yolov5n-dcn trained on blood cells, tensors and a description of itself."""
    path = tmp_path_factory.mktemp("wts") / "cells.wts"
    assert run_cli(gen_wts.main, ["-w", str(weights), "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def plain(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as other writers leave it: tensors and nothing else."""
    path = tmp_path_factory.mktemp("wts") / "plain.wts"
    assert run_cli(gen_wts.main, ["-w", str(weights), "-o", str(path), "--plain"]) == 0
    return path


def line(capfd: pytest.CaptureFixture, *argv: object) -> str:
    """The one line that a wrong command leaves; nothing else is left."""
    assert run_cli(program.main, list(map(str, argv))) == 2
    errors = capfd.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: "), errors
    return errors[0]


@pytest.mark.parametrize("half", [False, True])
def test_an_engine_is_built(half: bool, wts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    argv = ["-s", str(wts), str(tmp_path / "a.engine"), "n_dcn", "--img", "320", "256", "--max-batch", "32"]
    assert run_cli(program.main, [*argv, *(["--half"] if half else [])]) == 0
    meta, maker, engine = read_engine(tmp_path / "a.engine")
    assert engine.startswith(b"vtrt")
    assert (6_000_000 if not half else 3_000_000) < len(engine) < (14_000_000 if not half else 8_000_000)
    assert (meta.names, meta.imgsz, meta.batch, meta.half) == (("RBC", "WBC", "Platelets"), (320, 256), 32, half)
    assert (meta.stride, meta.strides, meta.dcn, meta.dynamic) == (32, (8, 16, 32), "gridsample", False)
    assert (maker.module, maker.targets) == ("tensorrt_rtx", CARDS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.engine"]


def test_batches_and_cards_that_an_engine_is_for(wts: Path) -> None:
    """Read from what TensorRT is given to build with."""
    net = TensorRtNetwork(load_tensorrt("tensorrt_rtx"), EngineOptions(2, 4, (86, 120)))
    describe_network(load_sized(wts, []), net, (64, 96))
    config = net.config()
    assert config.num_optimization_profiles == 1 and config.num_compute_capabilities == 2
    cards = [config.get_compute_capability(number).name for number in range(2)]
    assert cards == ["SM86", "SM120"] and net.targets() == (86, 120)
    profile = net.profile()
    assert [tuple(shape) for shape in profile.get_shape("images")] == [(count, 3, 64, 96) for count in (1, 2, 4)]
    assert tuple(net.network.get_output(0).shape) == (-1, 3 * (8 * 12 + 4 * 6 + 2 * 3), 8)


@pytest.mark.parametrize("half", [[], ["--half"]])
@pytest.mark.parametrize("form", ["gridsample", "deformconv"])
def test_the_same_network_as_onnx_finds_what_the_checkpoint_finds(
    form: str, half: list[str], plain: Path, weights: Path, tmp_path: Path
) -> None:
    """-s, then -d on real pictures: the boxes of detect.py --weights cells.pt."""
    onnx = tmp_path / "cells.onnx"
    argv = ["-s", str(plain), str(onnx), "n_dcn", "--img", "256", "320", "--dcn", form, *half]
    assert run_cli(program.main, argv) == 0
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for path in sorted(CELLS.glob("*.jpg"))[:2]:
        (pictures / path.name).write_bytes(path.read_bytes())
    flags = ["--save-txt", "--save-conf", "--nosave", "--conf-thres", "0.4", "--device", "cpu"]
    flags += ["--img", "256", "320", "--project", str(tmp_path / "runs"), "--name"]
    assert run_cli(program.main, ["-d", str(onnx), str(pictures), *flags, "ours"]) == 0
    assert run_cli(detect.main, ["--weights", str(weights), "--source", str(pictures), *flags, "torch"]) == 0
    for path in sorted((tmp_path / "runs" / "torch" / "labels").iterdir()):
        expected, found = (_rows(path.parents[2] / name / "labels" / path.name) for name in ("torch", "ours"))
        assert len(expected) > 3
        assert torch.allclose(expected, found, atol=1e-2 if half else 1e-4)


def _rows(path: Path) -> torch.Tensor:
    rows = torch.tensor([[float(word) for word in text.split()] for text in path.read_text().splitlines()])
    return rows[torch.argsort(rows[:, 1] * 1000 + rows[:, 2])]


def test_export_include_engine(weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    argv = ["--weights", str(weights), "--include", "engine", "--output", str(tmp_path), "--img", "64"]
    assert run_cli(export.main, [*argv, "--batch-size", "4"]) == 0
    assert read_engine(tmp_path / "cells.engine")[0].batch == 4
    before = (tmp_path / "cells.engine").read_bytes()
    capfd.readouterr()
    assert run_cli(export.main, [*argv, "--dynamic"]) == 2
    assert "--dynamic: not for an engine" in capfd.readouterr().err
    assert (tmp_path / "cells.engine").read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_an_engine_asks_for_a_gpu(wts: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert run_cli(program.main, ["-s", str(wts), str(tmp_path / "a.engine"), "--img", "64"]) == 0
    capfd.readouterr()
    assert "an engine runs on an NVIDIA GPU" in line(capfd, "-d", tmp_path / "a.engine", CELLS)


def test_an_engine_for_other_cards_and_one_that_does_not_open(
    wts: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real module is asked to open it; only the card is made up."""
    assert run_cli(program.main, ["-s", str(wts), str(tmp_path / "a.engine"), "--img", "64", "--arch", "86"]) == 0
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "GPU")
    monkeypatch.setattr("torch.cuda.device", lambda device: contextlib.nullcontext())
    capfd.readouterr()
    for card, expected in (
        ((9, 0), r"for compute capability 8[.]6; this is a GPU \(9[.]0\); build it again here"),
        ((8, 6), r"tensorrt_rtx 1[.].* cannot open it \(.*\); build it again here"),
    ):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, card=card: card)
        with pytest.raises(ExportError, match=expected):
            open_runtime(tmp_path / "a.engine", "cuda")


def test_a_builder_that_finds_no_gpu_is_one_line() -> None:
    """As TensorRT proper answers without a driver; TensorRT for RTX does not mind."""

    def refuse(log: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    module = types.SimpleNamespace(ILogger=load_tensorrt().ILogger, Builder=refuse, __name__="tensorrt")
    with pytest.raises(ExportError, match="tensorrt cannot start its Builder here"):
        TensorRtNetwork(module, EngineOptions())


def test_what_runs_an_engine_is_there() -> None:
    """No engine can be run here; what run_engine.py calls at least exists in the real module."""
    trt = load_tensorrt("tensorrt_rtx")
    for owner, names in (
        (trt.Runtime, ["deserialize_cuda_engine"]),
        (trt.ICudaEngine, ["create_execution_context"]),
        (trt.IExecutionContext, ["set_input_shape", "get_tensor_shape", "set_tensor_address", "execute_async_v3"]),
    ):
        assert all(hasattr(owner, name) for name in names)


def test_wrong_sizes_are_one_line(wts: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    engine = tmp_path / "a.engine"
    for words, expected in (
        (["q"], "-s: q: no such size"),
        (["n_dnc"], "did you mean 'n_dcn'?"),
        (["n", "0.3", "0.5"], "numbers go with c"),
        (["c_dcn", "0.33"], "takes depth and width"),
        (["c_dcn", "deep", "wide"], "takes depth and width, like c_dcn 0.33 0.5; got deep wide"),
        (["c_dcn", "0", "1"], "depth_multiple must be a number above 0"),
        (["s_dcn"], "not a s_dcn: model.0.conv.weight has 1,728 values, not 3,456"),
        (["c_dcn", "0.33", "0.5"], "its tensors are those of n_dcn"),
        (["a", "b", "c", "d"], "expected WTS ENGINE"),
    ):
        assert expected in line(capfd, "-s", wts, engine, *words)
    assert not list(tmp_path.iterdir())


def test_plain_and_deformable_refuse_each_other(plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """tensorrtx and the article cannot tell x from x_dcn."""
    write_wts(tmp_path / "n.wts", wts_tensors(DetectionModel("yolov5n.yaml")))
    got = line(capfd, "-s", plain, tmp_path / "a.engine", "n")
    assert "not a n: model.1.conv.weight is not in it" in got and got.endswith("those of n_dcn")
    got = line(capfd, "-s", tmp_path / "n.wts", tmp_path / "a.engine", "n_dcn")
    assert "model.1.weight is not in it" in got and got.endswith("those of n")
    assert "give its size" in line(capfd, "-s", plain, tmp_path / "a.engine")


def test_missing_tensors_are_named(plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    tensors = read_any_weights(plain).model
    del tensors["model.9.cv1.bn.running_var"]
    write_wts(tmp_path / "a.wts", tensors)
    got = line(capfd, "-s", tmp_path / "a.wts", tmp_path / "a.engine", "n_dcn")
    assert got.endswith("a.wts: not a n_dcn: model.9.cv1.bn.running_var is not in it")


def test_all_sizes_have_layers() -> None:
    assert {"n", "x", "s6", "x_dcn", "m_dcn4", "m_dcn_best"} < set(SIZES) and len(SIZES) == 25
    for word in ("x_dcn", "n6", "l_dcn4"):
        assert isinstance(layers_of([word]), str)
        DetectionModel(layers_of(["c" + word[1:], "0.1", "0.1"]))


def test_a_size_is_told_by_its_tensors(plain: Path) -> None:
    checkpoint = read_any_weights(plain)
    assert size_of(checkpoint) == "n_dcn"
    del checkpoint.model["model.3.weight"]
    assert size_of(checkpoint) is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--img", "100"], "--imgsz 100 100: not multiples of the stride 32"),
        (["--img", "0"], "--imgsz 0 0: not multiples"),
        (["--img", "1", "2", "3"], "--imgsz 1 2 3: expected"),
        (["--dcn", "deformconv"], "--dcn deformconv: for an .onnx"),
        (["--arch", "90"], "--arch 90: tensorrt_rtx has no such target; it knows 75, 80, 86, 89, 120, 121"),
        (["--batch-size", "0"], "--batch-size 0: expected 1 to --max-batch, 8"),
        (["--batch-size", "9", "--max-batch", "4"], "--batch-size 9: expected 1 to --max-batch, 4"),
        (["--builder", "tensorrt"], "needs a package that is not installed: pip install tensorrt-"),
        (["--hlaf"], "--hlaf: no such flag, did you mean '--half'?"),
        (["--image", "no.jpg"], "no.jpg"),
    ],
)
def test_wrong_flags_are_one_line(
    flags: list[str], expected: str, wts: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert expected in line(capfd, "-s", wts, tmp_path / "a.engine", "n_dcn", *flags)
    assert not list(tmp_path.iterdir())


def test_wrong_files_are_one_line(wts: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "cut.wts").write_bytes(wts.read_bytes()[:1_000_000])
    assert "cut short" in line(capfd, "-s", tmp_path / "cut.wts", tmp_path / "a.engine", "n_dcn")
    assert "no such file" in line(capfd, "-s", tmp_path / "none.wts", tmp_path / "a.engine", "n_dcn")
    assert "expected a name that ends in .engine" in line(capfd, "-s", wts, tmp_path / "a.plan", "n_dcn")
    assert "a.engine: cannot be written" in line(capfd, "-s", wts, tmp_path / "no" / "a.engine", "n_dcn")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.wts"]


def test_a_read_only_folder_is_one_line(
    wts: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "a.engine.tmp")

    monkeypatch.setattr("tempfile.mkstemp", refuse)  # tests may run as root, whom no folder refuses
    got = line(capfd, "-s", wts, tmp_path / "a.engine", "n_dcn")
    assert got == f"error: {tmp_path}/a.engine: cannot be written (Permission denied); give another folder"


def test_without_tensorrt_the_line_says_what_to_install(
    wts: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.tensorrt.trt_backend.is_installed", lambda module: False)
    assert "pip install tensorrt-rtx" in line(capfd, "-s", wts, tmp_path / "a.engine", "n_dcn")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no header"),
        (b"vtrt" + bytes(100), "no header"),
        (b"\x02\x00\x00\x00{}engine", "no header"),
        (b"\x05\x00\x00\x00[[[[[engine", "no header"),
    ],
)
def test_other_engines_are_one_line(
    content: bytes, expected: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.engine").write_bytes(content)
    assert f"a.engine: {expected}" in line(capfd, "-d", tmp_path / "a.engine", CELLS)


def test_the_header_of_an_engine(tmp_path: Path) -> None:
    model, path = DetectionModel("yolov5n.yaml", nc=2), tmp_path / "a.engine"
    meta, maker = describe(model, (64, 96), batch=3, half=True), Maker("tensorrt_rtx", "1.7", (86,))
    whole = pack_engine(b"the engine", meta, maker)
    path.write_bytes(whole)
    assert read_engine(path) == (meta, maker, b"the engine")
    length = int.from_bytes(whole[:4], "little")
    assert json.loads(whole[4 : 4 + length])["imgsz"] == "[64, 96]"  # as docs/deploy.md tells C++ programs
    path.write_bytes(whole[:-10])
    with pytest.raises(ExportError, match="cut short"):
        read_engine(path)
    path.write_bytes(pack_engine(b"x", meta, Maker("os", "1", (86,))))
    with pytest.raises(ExportError, match="says that 'os' built it"):
        open_runtime(path)
    path.write_bytes(pack_engine(b"x", meta, maker))
    with pytest.raises(ConfigError, match="NVIDIA GPU"):
        open_runtime(path)
