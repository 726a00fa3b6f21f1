"""How a training step and a forward pass grow with the batch and with the image's side: time, memory, exponents.

    python -m benchmarks.step_scale --cfg yolov5s.yaml --sizes 320 640 960 1280 --batches 1 4 16 64
    python -m benchmarks.step_scale --cfg yolov5n.yaml --sizes 64 128 256 --batches 1 2 4 --batch 2 --size 128

Sizes are varied at --batch, batches at --size; one made-up batch is held in memory, no loader takes part. Steps are the
trainer's (on a GPU replayed as CUDA graphs); the forward pass is the fused model's, half precision on a GPU. Memory: on
a GPU the peak of what is allocated; on a CPU what a process of its own holds at its peak beyond what it held before
(model, optimizer and average included). The slope is the exponent of growth over the rows: 1 is in proportion to the
batch, 2 to the image's area; a GPU that small work does not fill lies below.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat

import torch

from benchmarks.forward import forward_ms
from benchmarks.made_up import made_up_training
from benchmarks.peak_memory import forget_peak, peak_kb
from benchmarks.report import cpu_name, heading, slope, table
from benchmarks.train_throughput import rate
from models.surgery import fuse
from models.yolo import DetectionModel
from utils.cli import add_dcn_backend_flag
from utils.config import TrainConfig
from utils.device import describe_device, select_device
from utils.errors import run_cli

HEADER = [f"{what}, {unit}" for what in ("step", "forward") for unit in ("ms", "images/s", "GB")]
Cost = Callable[[TrainConfig, torch.device], tuple[float, float]]


def step_cost(cfg: TrainConfig, device: torch.device) -> tuple[float, float]:
    """Milliseconds of a training step and GB at its peak."""
    cuda, before = device.type == "cuda", peak(device)
    learner, batch = made_up_training(cfg, device)
    speed = rate(learner, repeat(batch, 60 if cuda else 4), warmup=20 if cuda else 1)
    return cfg.batch_size / speed * 1e3, peak(device) - before


def forward_cost(cfg: TrainConfig, device: torch.device) -> tuple[float, float]:
    """Milliseconds of a fused model's forward pass and GB at its peak."""
    before = peak(device)
    model = fuse(DetectionModel(cfg.cfg).eval()).to(device)
    model = model.half() if device.type == "cuda" else model
    return forward_ms(model, cfg.batch_size, (cfg.imgsz, cfg.imgsz), device), peak(device) - before


def peak(device: torch.device) -> float:
    """GB, so far: of what is allocated on the GPU, or of this process."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else peak_kb() / 1e6


def apart(function: Cost, cfg: TrainConfig, device: torch.device) -> tuple[float, float]:
    """What ``function`` returns, on a CPU in a fresh process: what one has held at its peak it does not forget."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return function(cfg, device)
    with multiprocessing.get_context("spawn").Pool(1, initializer=forget_peak) as pool:
        return pool.apply(function, (cfg, device))


def row(value: int, cfg: TrainConfig, device: torch.device) -> list[object]:
    """``value`` and what HEADER names."""
    step, step_gb = apart(step_cost, cfg, device)
    forward, forward_gb = apart(forward_cost, cfg, device)
    found = [value, step, cfg.batch_size / step * 1e3, step_gb, forward, cfg.batch_size / forward * 1e3, forward_gb]
    print(*found, file=sys.stderr)
    return found


def with_slope(rows: list[list]) -> list[list]:
    """The rows and the exponent of each column beyond the first."""
    values, *columns = zip(*rows)
    return [*rows, ["slope", *(slope(values, column) for column in columns)]]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", default="yolov5s.yaml")
    parser.add_argument("--sizes", nargs="+", type=int, default=[320, 640, 960, 1280], metavar="PX")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64], metavar="N")
    parser.add_argument("--batch", type=int, default=16, help="at which sizes are varied (default: %(default)s)")
    parser.add_argument("--size", type=int, default=640, help="at which batches are varied (default: %(default)s)")
    parser.add_argument("--data", default="bccd.yaml", help="whose class count the steps use")
    parser.add_argument("--device", default="")
    add_dcn_backend_flag(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    device = select_device(args.device)
    cfg = partial(TrainConfig, cfg=args.cfg, data=args.data, workers=0, dcn_backend=args.dcn_backend)
    sizes = [row(size, cfg(batch_size=args.batch, imgsz=size), device) for size in args.sizes]
    batches = [row(batch, cfg(batch_size=batch, imgsz=args.size), device) for batch in args.batches]
    print(heading(f"{describe_device(device)}; {cpu_name()}"))
    print(f"Batch {args.batch}:\n\n{table(['side, px', *HEADER], with_slope(sizes))}\n")
    print(f"{args.size} px:\n\n{table(['batch', *HEADER], with_slope(batches))}")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
