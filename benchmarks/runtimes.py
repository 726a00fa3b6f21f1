"""A checkpoint in every format that can be had here: size, export, mAP on a data set, largest difference, speed.

    python -m benchmarks.runtimes --weights best.pt --data bccd.yaml --img 320
    python -m benchmarks.runtimes --weights best.pt --data bccd.yaml --formats onnx openvino --half

Files for any size, where a format has them, so that all see the same rectangles; ncnn takes one size and is measured
beside the checkpoint on squares. Times are of single images of that size, the smallest of several turns: forward pass
only, on the CPU.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

import val
from benchmarks.report import cpu_name, heading, table
from deploy.checking import difference, input_batch
from deploy.exporter import ExportOptions, Job, export, prepare
from deploy.formats import BY_NAME
from deploy.runtime import open_runtime
from utils.files import ROOT
from utils.images import read_image

FREE = ("onnx", "torchscript", "aoti", "openvino")
"""Formats whose files take any size."""
TURNS = 15


def measured_map(weights: Path, args: argparse.Namespace, folder: str, square: bool = False) -> tuple[float, float]:
    """mAP50 and mAP50-95 of val.py; ``square`` shows the checkpoint what a file of one size is shown."""
    settings = {"data": args.data, "imgsz": args.imgsz, "batch_size": 8, "device": "cpu", "noplots": True}
    only_size = (lambda _args, _model: args.imgsz) if square else val.only_size
    with mock.patch.object(val, "only_size", only_size):
        metrics = val.run(weights=str(weights), project=folder, **settings)
    return metrics.map50, metrics.map


def milliseconds(model, images: torch.Tensor) -> float:
    """Of one call, the smallest of TURNS."""
    times = []
    with torch.inference_mode():
        for _ in range(TURNS):
            start = time.perf_counter()
            model(images)
            times.append(time.perf_counter() - start)
    return 1000 * min(times)


def row(name: str, args: argparse.Namespace, job: Job, folder: str) -> list[str]:
    """One format in the table."""
    start = time.perf_counter()
    path = export(job, BY_NAME[name])
    seconds = time.perf_counter() - start
    size = sum(f.stat().st_size for f in path.rglob("*")) if path.is_dir() else path.stat().st_size
    runtime = open_runtime(path)
    image = input_batch(job.image, job.options.imgsz, 1, torch.device("cpu"))
    with torch.inference_mode():
        far = difference(job.model(image)[0], runtime(image)[0])
    map50, map_ = measured_map(path, args, folder)
    return [name, f"{size / 1e6:.1f}", f"{seconds:.1f}", f"{map50:.4f}", f"{map_:.4f}", f"{far.box:.2g}",
            f"{milliseconds(runtime, image):.1f}"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default=str(ROOT / "data" / "demo" / "yolov5n-dcn-start.pt"))
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--imgsz", "--img", type=int, default=320)
    parser.add_argument("--formats", nargs="+", default=[*FREE, "ncnn"])
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--dcn", default="")
    args = parser.parse_args()
    picture = read_image(sorted((ROOT / "data" / "bccd" / "images" / "val").glob("*.jpg"))[0])
    with tempfile.TemporaryDirectory() as folder:
        options = {"imgsz": (args.imgsz, args.imgsz), "half": args.half, "dcn": args.dcn, "folder": Path(folder)}
        free, fixed = (prepare(args.weights, ExportOptions(**options, dynamic=d), picture) for d in (True, False))
        image = input_batch(picture, (args.imgsz, args.imgsz), 1, torch.device("cpu"))
        base = f"{milliseconds(free.model, image):.1f}"
        size = f"{Path(args.weights).stat().st_size / 1e6:.1f}"
        rows = [["PyTorch", size, "", *(f"{v:.4f}" for v in measured_map(args.weights, args, folder)), "", base]]
        for name in args.formats:
            if name not in FREE:
                square = measured_map(args.weights, args, folder, square=True)
                rows.append(["PyTorch, squares", size, "", *(f"{v:.4f}" for v in square), "", base])
            rows.append(row(name, args, free if name in FREE else fixed, folder))
    heading(f"{Path(args.weights).name} at {args.imgsz} px, {cpu_name()}, {torch.get_num_threads()} threads")
    columns = ["format", "MB", "export, s", "mAP50", "mAP50-95", "largest difference, px", "ms an image"]
    print(table(columns, rows))


if __name__ == "__main__":
    main()
