"""aoti_detect, built by CMake against the torch that is installed, on real pictures: detect.py's boxes and pictures."""

from __future__ import annotations

import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import detect
from deploy.exporter import export
from deploy.formats import BY_NAME
from tests.deploy.conftest import CELLS
from tests.deploy.test_cpp import COMPILER, OPENCV, ROOT, labels_of
from utils.errors import run_cli
from utils.images import read_image

pytestmark = pytest.mark.deploy
SUFFIX = ".jpg" if OPENCV else ".ppm"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    torch_folder = Path(torch.__path__[0])
    make = ["cmake", "-S", str(ROOT / "deploy" / "cpp"), "-B", str(folder), f"-DTORCH={torch_folder}"]
    for command in ([*make, f"-DCMAKE_CXX_COMPILER={COMPILER}"], ["cmake", "--build", str(folder), "-j2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return folder / "aoti_detect"


@pytest.fixture(scope="module", params=[True, False], ids=["any-size", "batch-of-3"])
def package(request: pytest.FixtureRequest, weights: Path, make_job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    job = make_job(weights, imgsz=(256, 256), dynamic=request.param, batch=1 if request.param else 3, folder=folder)
    return export(job, BY_NAME["aoti"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for path in sorted(CELLS.glob("*.jpg"))[:10]:
        if SUFFIX == ".jpg":
            (folder / path.name).write_bytes(path.read_bytes())
        else:
            cv2.imwrite(str(folder / f"{path.stem}.ppm"), read_image(path)[:, :, ::-1])
    return folder


def test_boxes_and_pictures_are_those_of_detect(program: Path, package: Path, pictures: Path, tmp_path: Path) -> None:
    flags = ["--img", "256", "--save-txt", "--save-conf", "--project", str(tmp_path)]
    command = [program, "-d", package, pictures, *flags, "--name", "own", "--batch-size", "4"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sources = [str(path) for path in sorted(CELLS.glob("*.jpg"))[:10]]
    argv = ["--weights", str(package), "--source", *sources, *flags, "--name", "python", "--device", "cpu"]
    assert run_cli(detect.main, argv) == 0
    found, expected = labels_of(tmp_path / "own"), labels_of(tmp_path / "python")
    assert found.keys() == expected.keys() and len(expected) == 10
    for name, text in expected.items():
        rows, own = (np.array([line.split() for line in each.splitlines()], float) for each in (text, found[name]))
        np.testing.assert_allclose(own, rows, atol=2e-3)  # a box is rounded to whole pixels of some 400
    for name in expected:
        theirs, ours = (
            cv2.imread(str(tmp_path / folder / f"{name}{suffix}"))
            for folder, suffix in (("python", ".jpg"), ("own", SUFFIX))
        )
        assert (np.abs(theirs.astype(int) - ours).max(2) > 60).mean() < 0.2, name  # texts differ by OpenCV's font


def test_other_devices_and_files_are_one_line(program: Path, package: Path, pictures: Path, weights: Path) -> None:
    for words, line in (
        ([package, pictures, "--device", "0"], f"{package}: compiled for cpu, and --device is 0"),
        ([package, pictures, "--device", "tpu"], "--device tpu: expected cpu, 0, 1, ..."),
        ([package, pictures, "--plugin", "x.so"], "--plugin: for engines of TensorRT"),
        ([weights, pictures], f"{weights}: not a package of export.py"),
    ):
        done = subprocess.run([program, "-d", *map(str, words)], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {line}") and done.stderr.count("\n") == 1, done.stderr
