"""Where the time of a training sample goes: decode, resize, labels, colours, copies, collation.

    python -m benchmarks.data_stages [--data bccd.yaml] [--imgsz 640] [--cache ram disk] [--augment-device cpu]

Milliseconds of this process's own time a sample, each stage without those inside it. Reading the clock adds some
0.05 ms to a sample.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import cv2
import torch

from benchmarks.report import cpu_name, heading, table
from utils import dataloaders, dataset, images, mosaic
from utils.config import DataConfig
from utils.dataset import DetectionDataset, Draw
from utils.errors import run_cli

STAGES = {
    "read the file": [(images, "_read_bytes")],
    "decode": [(cv2, "imdecode")],
    "resize (file to frame, or to the cache)": [(cv2, "resize")],
    "warp (rotation, shear, perspective)": [(cv2, "warpAffine"), (cv2, "warpPerspective")],
    "mosaic: frame, windows": [(dataset, "mosaic"), (mosaic, "fill_windows"), (mosaic, "frame_windows")],
    "labels": [
        (mosaic, "canvas_maps"),
        (mosaic, "mosaic_labels"),
        (mosaic, "warp_labels"),
        (dataset, "warp_labels"),
        (dataset, "to_unit"),
        (dataset, "flip_labels"),
    ],
    "draws": [(dataset.np.random, "default_rng"), (dataset, "draw_perspective"), (dataset, "draw_hsv")],
    "HSV, flips": [(dataset, "finish")],
    "memory, collation": [(dataset, "shared_bytes"), (dataloaders, "collate")],
    "look up": [(DetectionDataset, "load_image")],
    "letterbox": [(dataset, "letterbox")],
    "mixup": [(dataset, "mixup")],
}


class Clock:
    """Own time of nested stages."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(STAGES, 0.0)
        self._inner = [0.0]

    def timed(self, stage: str, work: Callable) -> Callable:
        """``work``, its own time added to the stage."""

        def run(*args: object, **options: object) -> object:
            start = time.thread_time()
            self._inner.append(0.0)
            try:
                return work(*args, **options)
            finally:
                whole = time.thread_time() - start
                self.spent[stage] += whole - self._inner.pop()
                self._inner[-1] += whole

        return run

    @contextmanager
    def watching(self) -> Iterator[None]:
        """All stages timed."""
        with ExitStack() as stack:
            for stage, places in STAGES.items():
                for where, name in places:
                    stack.enter_context(mock.patch.object(where, name, self.timed(stage, getattr(where, name))))
            yield


def load(data: DetectionDataset, epoch: int, batch: int) -> tuple[int, float]:
    """One epoch in this process: images, seconds of its own time."""
    start = time.thread_time()
    for first in range(0, len(data), batch):
        samples = data.__getitems__([Draw(epoch, i) for i in range(first, min(first + batch, len(data)))])
        dataloaders.collate(samples)
    return len(data), time.thread_time() - start


def profile(config: DataConfig, args: argparse.Namespace, cache: str) -> dict[str, float]:
    """Milliseconds a sample by stage, of the epoch whose sum is the median."""
    data = DetectionDataset(config.train, args.imgsz, augment=True, names=config.names, cache=cache, show=False)
    data.finish_later = args.augment_device == "gpu"
    load(data, 0, args.batch_size)
    runs = []
    for epoch in range(args.repeats):
        clock = Clock()
        with clock.watching():
            count, seconds = load(data, epoch, args.batch_size)
        rest = seconds - sum(clock.spent.values())
        spent = {**clock.spent, "everything else": rest, "sum": seconds}
        runs.append({stage: value / count * 1e3 for stage, value in spent.items()})
    return sorted(runs, key=lambda run: run["sum"])[len(runs) // 2]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="bccd.yaml", help="dataset YAML (bccd.yaml)")
    parser.add_argument("--imgsz", type=int, default=640, help="side of the training image in pixels (640)")
    parser.add_argument("--batch-size", type=int, default=16, help="images a batch (16)")
    parser.add_argument("--cache", nargs="+", default=["", "ram", "disk"], choices=["", "ram", "disk"])
    parser.add_argument("--augment-device", choices=["cpu", "gpu"], default="cpu", help="gpu: without HSV and flips")
    parser.add_argument("--repeats", type=int, default=7, help="epochs of each (7)")
    args = parser.parse_args(argv)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    config = DataConfig.load(args.data)
    columns = [profile(config, args, cache) for cache in args.cache]
    print(heading(f"{cpu_name()}; mosaic {args.imgsz} px, batch {args.batch_size}"))
    rows = [[stage, *(f"{c[stage]:.2f}" for c in columns)] for stage in columns[0] if any(c[stage] for c in columns)]
    rows.append(["images/s of one core", *(f"{1e3 / c['sum']:.0f}" for c in columns)])
    print(table(["ms a sample", *(f"--cache {cache}" if cache else "from the files" for cache in args.cache)], rows))


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
