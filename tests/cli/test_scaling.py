"""benchmarks.scaling and its estimate: what they read out of a trace, what they compute, and that they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scaling, scaling_check
from benchmarks.scaling import overlap, parse, rows, spans, total, union
from benchmarks.scaling_estimate import Assumptions, Model, estimate, reduce_ms
from utils.errors import run_cli
from utils.files import ROOT


def event(name: str, start: float, length: float, cat: str = "kernel") -> dict:
    return {"name": name, "cat": cat, "ts": start, "dur": length}


def test_messages_that_no_kernel_hides() -> None:
    sent, other = spans(
        [
            event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 10, 10),
            event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 18, 7),
            event("gemm", 0, 12),
            event("Memset", 22, 1, "gpu_memset"),
            event("nccl:all_reduce", 0, 100, "gpu_user_annotation"),
        ]
    )
    busy = union(sent)
    assert busy == [(10, 25)] and total(busy) == 15
    assert overlap(busy, union(other)) == 3  # 10 to 12, 22 to 23


def test_efficiency_is_against_one_gpu_with_the_same_steps() -> None:
    args = parse(["--gpus", "1", "2", "--cfg", "yolov5n.yaml", "--batch", "4", "--device", "cpu"])
    assert args.total == 8
    row = dict(cfg="yolov5n", step="usual", source="resident", ms=10.0, memory_gb=0.0)
    row |= dict(messages_ms=None, not_hidden_ms=None, alone_ms=None)
    results = [
        row | dict(batch=4, gpus=1, images_per_second=100.0),
        row | dict(batch=8, gpus=1, images_per_second=120.0),
        row | dict(batch=4, gpus=2, images_per_second=180.0),
    ]
    found = {(line[1], line[4]): (line[5], line[7]) for line in rows(results, args)}
    assert found == {
        ("weak", 1): (4, "1.000"),
        ("weak", 2): (4, "0.900"),
        ("strong", 1): (8, "1.000"),
        ("strong", 2): (4, "0.750"),
    }


def test_no_gpus_are_not_a_division_by_zero(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(["--gpus", "0"])
    assert "--gpus 0: at least 1" in capsys.readouterr().err


def test_the_estimate_follows_its_assumptions() -> None:
    a = replace(Assumptions(), spread=0.0, slowdown=0.0, nvlink_latency_us=0.0)
    assert reduce_ms(320, 2, a) == pytest.approx(1.0) and reduce_ms(320, 8, a) == pytest.approx(1.75)
    assert estimate(Model("m", 16, 100.0, 320.0), 1, a)["efficiency"] == 1
    bare = estimate(Model("m", 16, 100.0, 320.0, one_message=True), 8, a)
    assert bare["shows"] == pytest.approx(1.75) and bare["step"] == pytest.approx(101.75)
    hidden = estimate(Model("m", 16, 100.0, 320.0), 8, a)  # 13 buckets: the last one shows
    assert hidden["shows"] == pytest.approx(1.75 / 13)
    slow = replace(a, network=1.0, cards_a_host=1)
    assert estimate(Model("m", 16, 100.0, 320.0), 64, slow)["shows"] > 500  # messages that take longer than the step
    assert estimate(Model("m", 16, 100.0, 320.0), 64, Assumptions())["efficiency"] < 0.95


@pytest.mark.processes
def test_the_benchmark_and_the_check_run(tmp_path: Path, tiny: Path) -> None:
    def call(module: str, *flags: str) -> str:
        command = [sys.executable, "-m", f"benchmarks.{module}", *flags]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        return done.stdout.decode()

    file = tmp_path / "scaling.json"
    flags = "--gpus 1 2 --cfg yolov5n --batch 2 --imgsz 64 --device cpu --steps 2 --warmup 1 --message-mb 1 --workers 1"
    text = call("scaling", *flags.split(), "--data", str(tiny), "--json", str(file))
    assert text.count("| yolov5n | weak | resident |") == 2 and text.count("| yolov5n | weak | loader |") == 2
    assert "GB/s a link of a ring" in text and len(json.loads(file.read_text())["results"]) == 5
    assert "measured, all-reduce over 2 GPUs" in call("scaling_estimate", "--measured", str(file))
    flags = "--gpus 1 2 --cfg yolov5n --batch 4 --imgsz 64 --device cpu --epochs 1 --workers 0 --val-batch 2"
    text = call("scaling_check", *flags.split(), "--data", str(tiny))
    assert "| train/box_loss | 0 |" in text and "Sharded validation: the same" in text


@pytest.mark.parametrize("main", [scaling.main, scaling_check.main])
@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--cfg", "yolov5q"], "no such model YAML"), (["--data", "nope.yaml"], "--data nope.yaml: no such file")],
)
def test_files_that_are_not_there_are_one_line(flags: list[str], message: str, main, capsys) -> None:
    assert run_cli(main, ["--gpus", "1", "--device", "cpu", *flags]) == 2
    out, error = capsys.readouterr()
    assert not out and message in error and error.count("\n") == 1
