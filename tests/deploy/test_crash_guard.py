"""Packages whose loader ends the process: export.py, detect.py and val.py say so in one line and live on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deploy.crash_guard
import deploy.exporter
import deploy.run_apart
import deploy.run_torch
import detect
import export
from deploy.crash_guard import how_it_ended, run_module, try_package
from utils.errors import run_cli

CPU = torch.device("cpu")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As where packages are tried first, with a package that ends whatever opens it; returns a folder for files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(deploy.crash_guard, "TRIAL", "tests.deploy.dies")
    for module in (deploy.exporter, deploy.run_torch):
        monkeypatch.setattr(module, "may_crash", lambda device: True)
    monkeypatch.setattr(deploy.exporter, "export_aoti", lambda model, example, path, meta: path.write_bytes(b"made"))
    own = {"names": '["a"]', "stride": "32", "strides": "[8, 16, 32]", "imgsz": "[64, 64]"}
    for module in (deploy.run_apart, deploy.run_torch):
        monkeypatch.setattr(module, "read_metadata", lambda path: own)
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_an_export_that_dies_when_opened_is_one_line_and_no_file(
    on_gpu: Path, tiny: Path, capfd: pytest.CaptureFixture
) -> None:
    argv = ["--weights", str(tiny), "--include", "aoti", "--img", "64", "--output", str(on_gpu)]
    assert run_cli(export.main, argv) == 2
    errors = capfd.readouterr().err.splitlines()
    assert errors == [
        f"error: {on_gpu / 'tiny.pt2'}: compiled, but a process that opened it was ended by SIGSEGV (torch "
        f"{torch.__version__}); nothing is written: use --include onnx or torchscript, or --device cpu"
    ]
    assert list(on_gpu.iterdir()) == []


def test_opening_one_is_one_line(on_gpu: Path, capfd: pytest.CaptureFixture) -> None:
    package = on_gpu / "best.pt2"
    package.write_bytes(b"made")
    assert run_cli(detect.main, ["--weights", str(package), "--project", str(on_gpu / "runs")]) == 2
    errors = capfd.readouterr().err.splitlines()
    assert errors == [
        f"error: {package}: a process that opened it was ended by SIGSEGV (torch {torch.__version__}); run the "
        "checkpoint, or a file of --include onnx or torchscript"
    ]


def test_a_trial_that_went_well_is_not_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    package, calls = tmp_path / "best.pt2", []

    def ends(module: str, words: list[str], seconds: float) -> deploy.crash_guard.subprocess.CompletedProcess:
        calls.append(words)
        return deploy.crash_guard.subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(deploy.crash_guard, "run_module", ends)
    package.write_bytes(b"one")
    deploy.crash_guard.refuse_what_crashes(package, CPU)
    moved = package.rename(tmp_path / "renamed.pt2")
    deploy.crash_guard.refuse_what_crashes(moved, CPU)
    assert calls == [[str(package), "cpu"]]
    moved.write_bytes(b"another")
    deploy.crash_guard.refuse_what_crashes(moved, CPU)
    assert len(calls) == 2


def test_a_trial_that_ends_with_a_line_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.pt2").write_bytes(b"not a package")
    trial = try_package(tmp_path / "a.pt2", CPU)
    assert trial.grief == "" and trial.error.startswith(f"{tmp_path / 'a.pt2'}: not a package of export.py")


def test_how_processes_end() -> None:
    assert how_it_ended(0) == how_it_ended(2) == ""
    assert how_it_ended(-6).endswith("ended by SIGABRT") and how_it_ended(-60).endswith("ended by signal 60")
    assert "was not done in 300 s" in how_it_ended(
        run_module("timeit", ["-n1", "import time; time.sleep(9)"], 0.5).returncode
    )
