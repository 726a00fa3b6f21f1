"""Speed of the data path: images a second on one core, from disk and from memory, against two yardsticks.

    python -m benchmarks.dataloader [--data bccd.yaml] [--imgsz 640] [--batch-size 16] [--workers 0 1 2]

Yardsticks, measured in the same process and turn by turn with ours, on the same images and draws:
  plain canvas   the mosaic painted on a canvas of twice the size, warped whole in three channels, colours by three
                 look-up tables, images joined and transposed to (B, 3, H, W)
  limit          decoding four images a sample and nothing else (disk); copying the finished pixels (memory)

    python -m benchmarks.dataloader --against CHECKOUT [--later]

loads the same data by another checkout of this repository (``git worktree add CHECKOUT COMMIT``) and by this one, epoch
by epoch in turns. ``--later``: this one leaves colours and mirrors to a GPU (which then does them in no time). The mean
and the spread of the pixels and the mean difference of neighbours are told as well: the draws are the same.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.report import cpu_name, heading, table
from utils.augmentations import draw_hsv, draw_perspective, hsv_tables, warp_labels
from utils.config import DataConfig
from utils.dataloaders import DetectionLoader, create_dataloader
from utils.dataset import DetectionDataset, Draw, Sample, to_unit
from utils.errors import ResourceError, run_cli
from utils.files import ROOT
from utils.images import read_image
from utils.mosaic import canvas_maps, draw_centre, mosaic_labels, paste_tiles, place_tiles


class PlainCanvas(DetectionDataset):
    """The same samples made the plain way."""

    def _training_sample(self, draw: Draw, out: np.ndarray | None = None) -> Sample:
        rng, hyp, size = np.random.default_rng(tuple(draw)), self.hyp, self.imgsz
        chosen = [draw.index, *map(int, rng.integers(len(self), size=3))]
        images = [self.load_image(i) for i in chosen]
        shapes = [image.shape[:2] for image in images]
        tiles = place_tiles(draw_centre(rng, size), shapes, size)
        canvas = paste_tiles(lambda k: images[k], tiles, size)
        boxes, _ = mosaic_labels(canvas_maps(tiles, shapes), [self.index.rows(i) for i in chosen], [None] * 4, size)
        look = draw_perspective(rng, hyp.degrees, hyp.translate, hyp.scale, hyp.shear)
        matrix = look.matrix((2 * size, 2 * size), (size, size))
        image = cv2.warpAffine(canvas, matrix[:2], (size, size), borderValue=(114,) * 3)
        labels = to_unit(warp_labels(boxes, None, look, matrix, (size, size)), image.shape)
        tables = hsv_tables(draw_hsv(rng, (hyp.hsv_h, hyp.hsv_s, hyp.hsv_v)))
        planes = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
        image = cv2.cvtColor(cv2.merge([cv2.LUT(p, t) for p, t in zip(planes, tables)]), cv2.COLOR_HSV2RGB)
        if rng.random() < hyp.fliplr:
            image = cv2.flip(image, 1)
            labels[:, 1] = 1 - labels[:, 1]
        return Sample(image, labels, self.path(draw.index), None, draw)


def plain_collate(samples: list[Sample]) -> torch.Tensor:
    """(B, 3, H, W) contiguous, image by image."""
    return torch.stack([torch.from_numpy(np.ascontiguousarray(s.image.transpose(2, 0, 1))) for s in samples])


def plain_epoch(data: PlainCanvas, batch_size: int, epoch: int) -> int:
    """One epoch of the plain way in this process; returns how many images."""
    order = np.random.default_rng(epoch).permutation(len(data)).tolist()
    for start in range(0, len(order), batch_size):
        plain_collate([data[Draw(epoch, i)] for i in order[start : start + batch_size]])
    return len(order)


def limit_epoch(data: DetectionDataset, cached: bool) -> int:
    """The least that must be done for one epoch."""
    target = np.empty((data.imgsz, data.imgsz, 3), np.uint8)
    source = np.zeros_like(target)
    for index in range(len(data)):
        if cached:
            np.copyto(target, source)
        else:
            for _ in range(4):
                read_image(data.path(index))
    return len(data)


def rate(work: Callable[[], int], in_process: bool) -> float:
    """Images a second of one run: of this core's own time when all work is in this process (a busy machine then
    disturbs little), else of wall time."""
    clock = time.process_time if in_process else time.perf_counter
    start = clock()
    return work() / (clock() - start)


def loader_epoch(loader: DetectionLoader) -> int:
    """One epoch of ours; returns how many images."""
    return sum(len(batch.paths) for batch in loader)


def compare(config: DataConfig, args: argparse.Namespace) -> list[tuple[str, ...]]:
    """Rows of the table: case, ours, plain, ratio, limit, ours as a share of the limit."""
    rows = []
    for cache in ("", "ram"):
        options = {"augment": True, "names": config.names, "cache": cache, "show": False}
        data = DetectionDataset(config.train, args.imgsz, **options)
        plain = PlainCanvas(config.train, args.imgsz, **options)
        for workers in args.workers:
            loader = create_dataloader(data, args.batch_size, shuffle=True, workers=workers)
            loader_epoch(loader)  # processes start, files come into memory
            results: dict[str, list[float]] = {"ours": [], "plain": [], "limit": []}
            for turn in range(args.repeats):
                loader.set_epoch(turn)
                results["ours"].append(rate(partial(loader_epoch, loader), workers == 0))
                if workers == 0:
                    results["plain"].append(rate(partial(plain_epoch, plain, args.batch_size, turn), True))
                    results["limit"].append(rate(partial(limit_epoch, data, bool(cache)), True))
            rows.append(row(f"{'memory' if cache else 'disk'}, {workers} workers", results))
    return rows


def row(case: str, results: dict[str, list[float]]) -> tuple[str, ...]:
    """Medians with their spread, and the ratios."""
    middle = {key: statistics.median(values) for key, values in results.items() if values}
    shown = {key: f"{middle[key]:.0f} ({min(results[key]):.0f}-{max(results[key]):.0f})" for key in middle}
    ratio = f"{middle['ours'] / middle['plain']:.2f}x" if "plain" in middle else ""
    share = f"{middle['ours'] / middle['limit']:.0%}" if "limit" in middle else ""
    return case, shown["ours"], shown.get("plain", ""), ratio, shown.get("limit", ""), share


class Side:
    """A process that loads an epoch when told to, by the code of one checkout."""

    def __init__(self, checkout: Path, settings: list[str]) -> None:
        script = Path(__file__).with_name("loader_turn.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), *settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        )

    def turn(self) -> float:
        """Images a second of the next epoch."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:  # other lines are what the data set says of its caches
            if line.startswith("rate "):
                return float(line.split()[1])
        raise ResourceError(f"the loading process ended with status {self.process.wait()}")

    def close(self) -> str:
        """End the process; mean, spread and detail of its pixels."""
        self.process.stdin.close()
        last = self.process.stdout.read().split()[-3:]
        self.process.wait()
        return " / ".join(last)


def against(args: argparse.Namespace) -> list[tuple[str, ...]]:
    """Rows of the table: case, the other checkout, this one, the median of the ratios of neighbouring epochs."""
    rows = []
    for workers in args.workers:
        for cache in args.cache:
            settings = [str(Path(args.data).resolve()), str(args.imgsz), str(args.batch_size), str(workers), cache]
            sides = [Side(args.against, settings), Side(ROOT, settings + ["later"] * args.later)]
            rates = [[side.turn() for side in sides] for _ in range(args.repeats + 1)][1:]
            pixels = [side.close() for side in sides]
            shown = [f"{statistics.median(r):.0f} ({min(r):.0f}-{max(r):.0f})" for r in zip(*rates)]
            ratio = statistics.median(ours / theirs for theirs, ours in rates)
            rows.append((f"{cache}, {workers} workers", *shown, f"{ratio:.2f}x", *pixels))
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="bccd.yaml", help="dataset YAML (bccd.yaml)")
    parser.add_argument("--imgsz", type=int, default=640, help="side of the training image in pixels (640)")
    parser.add_argument("--batch-size", type=int, default=16, help="images a batch (16)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="loader processes to try (0 1 2)")
    parser.add_argument("--repeats", type=int, default=5, help="timed epochs of each case (5)")
    parser.add_argument("--cache", nargs="+", default=["none", "ram", "disk"], help="with --against (none ram disk)")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of this repository")
    parser.add_argument("--later", action="store_true", help="with --against: as --augment-device gpu")
    args = parser.parse_args(argv)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    if args.against:
        rows = against(args)
        print(heading(f"{cpu_name()}; mosaic {args.imgsz} px, batch {args.batch_size}"))
        pixels = "pixels: mean / spread / neighbours"
        print(table(["case", "before, images/s", "now", "ratio", f"before, {pixels}", "now"], rows))
        return
    config = DataConfig.load(args.data)
    rows = compare(config, args)
    print(heading(f"{cpu_name()}; mosaic {args.imgsz} px, batch {args.batch_size}"))
    print(table(["case", "ours, images/s", "plain canvas", "ratio", "limit", "of the limit"], rows))


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
