"""val.py and detect.py on the CPU as a user runs them: seconds for a whole val, milliseconds an image for detect.

    python -m benchmarks.inference_cpu --data bccd.yaml --weights yolov5n=n.pt yolov5s=s.pt yolov5s-dcn=dcn.pt

Upstream's figures are those of the same work on the same kind of machine (2 cores of an EPYC, 2026-11-24, 87 images
of BCCD at 640 px, batch 32, trained weights): they make the ratio. The limit is the bare forward pass, timed here;
beside it the same pass with weights and image laid out the usual way, turn by turn in one process.
"""

from __future__ import annotations

import argparse
import copy
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


def forward_ms(weights: Path, imgsz: int, repeats: int = 9) -> tuple[float, float]:
    """Milliseconds of one image through the fused model as load_model lays it out (channels last), and laid out the
    usual way (contiguous): the smallest of several turns of each, so that a busy moment spoils neither."""
    model = load_model(weights)
    usual = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    image = torch.rand(1, 3, imgsz, imgsz)
    turns = [(model, image.contiguous(memory_format=torch.channels_last), []), (usual, image, [])]
    with torch.inference_mode():
        for _ in range(repeats):
            for network, picture, times in turns:
                start = time.perf_counter()
                network(picture)
                times.append(time.perf_counter() - start)
    return 1000 * min(turns[0][2]), 1000 * min(turns[1][2])


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
        limit, usual = forward_ms(Path(file), args.imgsz)
        rows.append(
            [name, val_seconds, then_val, then_val / val_seconds, per_image, then_detect, then_detect / per_image]
        )
        rows[-1] += [whole * 1000 / images, limit, usual, usual / limit]
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
        "contiguous, ms",
        "ratio",
    ]
    print(table(header, rows))


if __name__ == "__main__":
    main()
