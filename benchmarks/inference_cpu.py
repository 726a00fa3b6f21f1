"""val.py and detect.py on the CPU as a user runs them: seconds for a whole val, milliseconds an image for detect.

    python -m benchmarks.inference_cpu --data bccd.yaml --weights yolov5n=n.pt yolov5s=s.pt yolov5s-dcn=dcn.pt --int8

Upstream's figures are those of the same work on the same kind of machine (2 cores of an EPYC, 2026-11-24, 87 images
of BCCD at 640 px, batch 32, trained weights): they make the ratio. The limit is the bare forward pass, timed here;
beside it the same pass with weights and image laid out the usual way, turn by turn in one process. On a CPU with
bfloat16 products each model has a second row, with --half; with --int8 a third, of its ONNX file in eight bits.
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

import export
from benchmarks.report import cpu_name, heading, table
from models.loading import load_model
from models.surgery import in_dtype
from utils.config import DataConfig
from utils.device import cpu_has_bfloat16

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


def forward_ms(weights: Path, imgsz: int, dtype: torch.dtype, repeats: int = 9) -> tuple[float, float]:
    """Milliseconds of one image through the fused model as load_model lays it out (channels last), and laid out the
    usual way (contiguous): the smallest of several turns of each, so that a busy moment spoils neither."""
    model = in_dtype(load_model(weights), dtype)
    usual = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    image = torch.rand(1, 3, imgsz, imgsz, dtype=dtype)
    turns = [(model, image.contiguous(memory_format=torch.channels_last), []), (usual, image, [])]
    with torch.inference_mode():
        for _ in range(repeats):
            for network, picture, times in turns:
                start = time.perf_counter()
                network(picture)
                times.append(time.perf_counter() - start)
    return 1000 * min(turns[0][2]), 1000 * min(turns[1][2])


def measure(name: str, file: str, args: argparse.Namespace, folder: Path, images: int, half: bool) -> list[float]:
    """A row of the table, without its name."""
    shared = ["--weights", file, "--imgsz", str(args.imgsz), *(["--half"] if half else [])]
    val_seconds, printed = run("val.py", *shared, "--data", args.data, "--batch-size", "32", "--workers", "2")
    print(f"{name}: {re.search(r'^ +all .*$', printed, re.MULTILINE).group().strip()}", file=sys.stderr)
    whole, out = run("detect.py", *shared, "--source", str(folder), "--nosave")
    stages = re.findall(r"([\d.]+)ms (?:pre-process|inference|NMS)", out.split("Speed:")[-1])
    per_image = sum(map(float, stages))
    then_val, then_detect = UPSTREAM.get(name, (float("nan"),) * 2)
    bare: list = ["-"] * 3
    if file.endswith(".pt"):
        limit, usual = forward_ms(Path(file), args.imgsz, torch.bfloat16 if half else torch.float32)
        bare = [limit, usual, usual / limit]
    row = [val_seconds, then_val, then_val / val_seconds, per_image, then_detect, then_detect / per_image]
    return [*row, whole * 1000 / images, *bare]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="bccd.yaml")
    demo = "yolov5n-dcn=data/demo/yolov5n-dcn-start.pt"
    parser.add_argument("--weights", nargs="+", default=[demo], metavar="NAME=FILE")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--int8", action="store_true", help="ONNX files in eight bits as well")
    args = parser.parse_args()
    folder = DataConfig.load(args.data).val[0]
    images = len(list(folder.iterdir()))
    rows = []
    for item in args.weights:
        name, file = item.split("=", 1)
        rows.append([name, *measure(name, file, args, folder, images, half=False)])
        if cpu_has_bfloat16():
            rows.append([f"{name} --half", *measure(name, file, args, folder, images, half=True)])
        if args.int8:
            with tempfile.TemporaryDirectory() as out:
                [path] = export.run(weights=file, int8=True, dynamic=True, data=args.data, imgsz=args.imgsz, output=out)
                rows.append([f"{name} --int8", *measure(name, str(path), args, folder, images, half=False)])
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
