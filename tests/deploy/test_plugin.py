"""The TensorRT plugin without a GPU: its kernels interpreted, the library in TensorRT's own registry and builder, and
computing with a driver that is made up (fake_driver)."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

import gen_wts
from benchmarks.plugin import Case, error, exact, random_inputs, runner
from deploy.tensorrt.engine_file import Maker, pack_engine, read_engine
from deploy.tensorrt.plugin import kernels
from deploy.tensorrt.plugin.build import HERE, PluginOptions, layers_of
from deploy.tensorrt.plugin.compile import NUMBERS, numbers_of
from deploy.tensorrt.plugin.harness import Harness, Settings, build_harness
from models.ops.geometry import Geometry
from models.yolo import DetectionModel
from tests.deploy.fake_driver import build_driver, build_plugin
from tests.deploy.trt_interpreter import needs_wheel
from utils.errors import ExportError, MissingPackage, run_cli

engines = importlib.import_module("deploy.tensorrt.__main__")
program = importlib.import_module("deploy.tensorrt.plugin.__main__")
ROOT = Path(__file__).resolve().parents[2]
OWN = Geometry((2, 2), (1, 1), (1, 1), (3, 3), 8, 16, 1, 1, False)
SMALL = (
    Case(3, 5, (5, 9), Settings((1, 2), (1, 0)), batch=2, bias=False),
    Case(12, 20, (7, 6), Settings((2, 1), (1, 2), (1, 2), (2,), (3,)), (2, 3), 1),
)
LIMITS = {"fp32": 3e-6, "fp16": 5e-4, "bf16": 4e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with kernels that are texts, and what plays TensorRT and the driver for it."""
    folder = tmp_path_factory.mktemp("plugin")
    build_driver(folder)
    build_harness(folder / "harness.so")
    build_plugin(folder / "plugin", PluginOptions((OWN,), ("fp32", "fp16", "bf16"), (80, 86, 90)))
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict:
    """What a process with TensorRT's registry and the made-up driver saw."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.deploy.fake_driver", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"said": done.stderr, **json.loads(done.stdout)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where no GPU is")
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize(("dtype", "shares"), [(torch.float32, 1), (torch.float32, 4), (torch.float16, 1)])
def test_kernels_in_tritons_interpreter(
    case: Case, dtype: torch.dtype, shares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which tests/conftest.py chose when the kernels were imported
    x, offset, mask, weight, *bias = inputs = random_inputs(case, dtype, device="cpu")
    (batch, channels, height, width), (rows, columns), outputs = x.shape, offset.shape[2:], len(weight)
    s, groups, patch, wide = case.settings, case.settings.groups[0], (16, 4), 16
    geometry = Geometry(
        s.stride, s.padding, s.dilation, case.kernel, channels, outputs, groups, s.offset_groups[0], False
    )
    turned = [
        transposed(x.reshape(batch, channels, -1)),
        transposed(weight.reshape(groups, outputs // groups, -1)),
    ]
    assert torch.equal(turned[0].reshape(batch, height, width, channels), x.permute(0, 2, 3, 1))
    out = torch.full((batch, rows, columns, outputs), float("nan"), dtype=dtype)
    partial = torch.full((shares, *out.shape), float("nan"))
    patches = batch * triton.cdiv(columns, patch[1]) * triton.cdiv(rows, patch[0] // patch[1])
    grid = (patches * triton.cdiv(outputs // groups, wide), groups, shares)
    given = bias[0] if bias else weight  # as the plugin, which has to give something
    kernels.deform_conv[grid](
        turned[0], offset, mask, turned[1], given, out if shares == 1 else partial, batch, height, width, rows, columns,
        len(bias), **dict(zip(NUMBERS, numbers_of(geometry))), PARTIAL=shares > 1, PRECISION="ieee", BM=patch[0],
        TW=patch[1], BC=16, BN0=wide, BN1=0,
    )  # fmt: skip
    if shares > 1:
        size = out.numel()
        kernels.add_up[(triton.cdiv(size, 64),)](partial, given, out, shares, size, outputs, len(bias), BLOCK=64)
    limit = LIMITS["fp32" if dtype == torch.float32 else "fp16"]
    assert error(out.permute(0, 3, 1, 2), exact(s, inputs)) < limit


def transposed(maps: torch.Tensor) -> torch.Tensor:
    batch, rows, columns = maps.shape
    bits = torch.int16 if maps.element_size() == 2 else torch.int32
    turned = torch.empty((batch, columns, rows), dtype=maps.dtype)
    grid = (batch * triton.cdiv(rows, 32) * triton.cdiv(columns, 32),)
    kernels.transpose[grid](maps.contiguous().view(bits), turned.view(bits), rows, columns, BLOCK=32)
    return turned


def test_tensorrts_registry_creates_it_and_fields_come_back(seen: dict) -> None:
    assert seen["names"] == ["stride", "padding", "dilation", "groups", "offset_groups"]
    expected = {"stride": [2, 1], "padding": [0, 3], "dilation": [1, 2], "groups": [2], "offset_groups": [4]}
    assert seen["fields"] == [expected] * 4


def test_types_and_formats(seen: dict) -> None:
    found = seen["formats"]
    assert [found[f"x 16 {type}"] for type in (0, 1, 7, 2, 3)] == [[0, 8], [0, 2], [0, 2], [], []]
    assert [found[f"x 12 {type}"] for type in (0, 1, 7)] == [[0, 8], [0], [0]]
    others = {name: value for name, value in found.items() if not name.startswith("x ")}
    assert [name for name, value in others.items() if value] == ["weight as x", "output as x", "wide"]


def test_wrong_fields_and_shapes_are_refused(seen: dict) -> None:
    assert [name for name, value in seen["refused"].items() if not value] == ["nothing", "unknown batch"]
    for line in ("field stride: expected 2 int32", "no field is called strides", "bias has 31 values, not 32"):
        assert f"DCNv2: {line}" in seen["said"]


def test_any_layer_is_computed(seen: dict) -> None:
    """Groups, offset groups, strides, dilations, kernels, batches, sizes, with and without a bias, both formats."""
    assert len(seen["errors"]) > 25
    for name, value in seen["errors"].items():
        assert value < LIMITS[name.split()[-2]], (name, value)
    assert all(value < LIMITS["fp16"] for value in seen["changes"])


def test_what_is_launched(seen: dict) -> None:
    """name, kind, for one layer only, grid, stream."""
    own, linear, many = seen["launches"]
    assert own == ["transpose 3 0 3 1 1 7", "deform_conv 1 1 8 1 9 7", "add_up 2 0 4 1 1 7"]
    assert [line.split()[0] for line in linear] == ["transpose", "transpose", "deform_conv", "add_up", "transpose"]
    assert many == ["transpose 3 0 3 1 1 7", "deform_conv 0 1 338 1 1 7"]


def test_what_fails_is_a_return_code(seen: dict) -> None:
    found = seen["failures"]
    assert [name for name, value in found.items() if not value] == ["again", "80", "86", "89", "90"]
    assert "no kernel for compute capability 7.5 and this type; build it with --arch 75" in seen["said"]
    assert "cuLaunchKernel of transpose for 90: made to fail (4)" in seen["said"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_no_driver(folder: Path, capfd: pytest.CaptureFixture) -> None:
    harness = Harness(folder / "harness.so", None, folder / "plugin" / "libdcnv2.so")
    with pytest.raises(RuntimeError, match="onShapeChange"):
        runner(harness, SMALL[0].settings, random_inputs(SMALL[0], torch.float16, device="cpu"), False)
    assert "there is no CUDA driver" in capfd.readouterr().err


def test_the_command_compiles_kernels_and_library(tmp_path: Path) -> None:
    """For real, by Triton and the C++ compiler; a process of its own, since kernels are interpreted in this one."""
    library = tmp_path / "libdcnv2.so"
    command = [sys.executable, "-m", "deploy.tensorrt.plugin", "-o", str(library), "--arch", "90", "--types", "fp16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "7 kernels, 0 layers of their own, fp16, for 90" in done.stdout
    content = library.read_bytes()
    assert content.count(b"\x7fELF") > 7 and b"deform_conv" in content
    assert [path.name for path in tmp_path.iterdir()] == [library.name]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--arch", "33"], "--arch 33: expected some of 75, 80"),
        (["-o", "plugin.dll"], "expected a name that ends in .so"),
        (["--tensorrt", "/nowhere"], "no NvInferRuntime.h there"),
        (["--weights", "missing.pt"], "missing.pt"),
        (["-o", "/nowhere/libdcnv2.so"], "/nowhere"),
    ],
)
def test_wrong_input_is_one_line(
    flags: list[str], expected: str, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")  # put back what the program sets
    assert run_cli(program.main, flags) == 2
    errors = capfd.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and expected in errors[0], errors
    assert not list(tmp_path.iterdir())


def test_no_compiler_and_code_that_does_not_compile(tmp_path: Path) -> None:
    for compiler, kind, expected in (
        ("no-such-c++", MissingPackage, "C[+][+] compiler no-such-c"), ("c++ -DPluginField=1", ExportError, "error:")
    ):  # fmt: skip
        with pytest.raises(kind, match=expected):
            build_plugin(tmp_path / "p", PluginOptions((), ("fp16",), (90,), compiler=compiler))


@pytest.mark.skipif(shutil.which("cmake") is None, reason="CMake is not here")
def test_cmake(folder: Path, tmp_path: Path) -> None:
    quiet = {"capture_output": True, "text": True}
    configure = ["cmake", "-S", str(HERE), "-B", str(tmp_path), f"-DKERNELS={folder / 'plugin'}"]
    done = subprocess.run(configure, **quiet)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(["cmake", "--build", str(tmp_path)], **quiet)
    assert done.returncode == 0 and (tmp_path / "libdcnv2.so").is_file(), done.stdout + done.stderr


def test_layers_of_a_model() -> None:
    found = layers_of(DetectionModel("yolov5n-dcn.yaml"))
    assert [(g.channels, g.outputs, g.stride, g.padding, g.kernel) for g in found] == [
        (c, 2 * c, (2, 2), (1, 1), (3, 3)) for c in (16, 32, 64)
    ]


@needs_wheel
@pytest.mark.parametrize("half", [[], ["--half"]])
def test_an_engine_with_the_plugin(half: list[str], weights: Path, folder: Path, tmp_path: Path) -> None:
    """Built by TensorRT for RTX, with three layers that are ours."""
    wts, engine = tmp_path / "cells.wts", tmp_path / "cells.engine"
    assert run_cli(gen_wts.main, ["-w", str(weights), "-o", str(wts)]) == 0
    library = folder / "plugin" / "libdcnv2.so"
    argv = ["-s", str(wts), str(engine), "n_dcn", "--img", "320", "--plugin", str(library), "--max-batch", "16", *half]
    assert run_cli(engines.main, argv) == 0
    meta, maker, content = read_engine(engine)
    assert (meta.dcn, meta.batch, meta.half, maker.plugin) == ("plugin", 16, bool(half), "libdcnv2.so")
    assert content.startswith(b"vtrt") and content.count(b"DCNv2") >= 3


@needs_wheel
def test_what_the_plugin_refuses_is_in_tensorrts_words(folder: Path) -> None:
    """Its message comes through TensorRT's logger."""
    import numpy as np

    from deploy.tensorrt.backend import Steps
    from deploy.tensorrt.plugin_backend import PluginNetwork
    from deploy.tensorrt.trt_backend import EngineOptions, load_tensorrt

    net = PluginNetwork(load_tensorrt("tensorrt_rtx"), EngineOptions(), folder / "plugin" / "libdcnv2.so")
    weight, x = np.zeros((8, 8, 3, 3), np.float32), net.input("images", (8, 8, 8))
    offset, mask = (net.conv(x, np.zeros((count, 8, 1, 1), np.float32), None, Steps()) for count in (18, 8))
    net.output(net.deform_conv(x, offset, mask, weight, None, Steps(padding=(1, 1))), "out")
    with pytest.raises(ExportError, match="DCNv2"):
        net.finish({})


@needs_wheel
def test_plugins_that_cannot_be(weights: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    for argv, expected in (
        (["a.onnx", "--plugin", "x.so"], "an .onnx for the plugin takes --dcn plugin"),
        (["a.engine", "--dcn", "plugin"], "or --plugin LIBRARY"),
    ):
        assert run_cli(engines.main, ["-s", str(weights), str(tmp_path / argv[0]), "n_dcn", *argv[1:]]) == 2
        assert expected in capfd.readouterr().err
    outside = pack_engine(b"x", describe_nothing(), Maker("tensorrt_rtx", "1", (), "../libdcnv2.so"))
    (tmp_path / "a.engine").write_bytes(outside)
    with pytest.raises(ExportError, match="cannot be"):
        read_engine(tmp_path / "a.engine")


def describe_nothing():
    from deploy.metadata import Metadata

    return Metadata(("a",), 32, (8.0, 16.0, 32.0), (64, 64))
