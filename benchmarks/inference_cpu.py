"""val.py and detect.py on the CPU as a user runs them: seconds for a whole val, milliseconds an image for detect.

    python -m benchmarks.inference_cpu --data bccd.yaml --weights yolov5n=n.pt yolov5s=s.pt yolov5s-dcn=dcn.pt

Upstream's figures are those of the same work on the same kind of machine (2 cores of an EPYC, 2026-11-24, 87 images
of BCCD at 640 px, batch 32, trained weights): they make the ratio. The limit is the bare forward pass, timed here.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.report import cpu_name, heading, table
from models.loading import load_model
from utils.config import DataConfig

ROOT = Path(__file__).resolve().parents[1]
UPSTREAM = {"yolov5n": (9.2, 32.0), "yolov5s": (18.5, 80.0), "yolov5s-dcn": (35.1, 208.0)}  # s of val, ms of detect


def run(script: str, *flags: str) -> tuple[float, str]:
    """Wall seconds and output of a script; its files go to a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, "--device", "cpu", "--project", folder, *flags]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    return seconds, done.stdout


def forward_ms(weights: Path, imgsz: int, repeats: int = 5) -> float:
    """Median milliseconds of the fused model on one square image."""
    model = load_model(weights)
    image = torch.rand(1, 3, imgsz, imgsz)
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            model(image)
            times.append(time.perf_counter() - start)
    return 1000 * sorted(times[1:])[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="bccd.yaml")
    demo = "yolov5n-dcn=data/demo/yolov5n-dcn-start.pt"
    parser.add_argument("--weights", nargs="+", default=[demo], metavar="NAME=FILE")
    parser.add_argument("--imgsz", type=int, default=640)
    args = parser.parse_args()
    folder = DataConfig.load(args.data).val[0]
    images = len(list(folder.iterdir()))
    rows = []
    for item in args.weights:
        name, file = item.split("=", 1)
        shared = ["--weights", file, "--imgsz", str(args.imgsz)]
        val_seconds, out = run("val.py", *shared, "--data", args.data, "--batch-size", "32", "--workers", "2")
        whole, out = run("detect.py", *shared, "--source", str(folder), "--nosave")
        per_image = sum(
            float(ms) for ms in re.findall(r"([\d.]+)ms (?:pre-process|inference|NMS)", out.split("Speed:")[-1])
        )
        then_val, then_detect = UPSTREAM.get(name, (float("nan"),) * 2)
        limit = forward_ms(Path(file), args.imgsz)
        rows.append(
            [name, val_seconds, then_val, then_val / val_seconds, per_image, then_detect, then_detect / per_image]
        )
        rows[-1] += [whole * 1000 / images, limit]
    print(heading(cpu_name()))
    header = [
        "model",
        "val, s",
        "upstream",
        "ratio",
        "detect, ms/image",
        "upstream",
        "ratio",
        "whole run, ms/image",
        "bare forward, ms",
    ]
    print(table(header, rows))


if __name__ == "__main__":
    main()
