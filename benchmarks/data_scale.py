"""How the data path scales: start and memory against the number of images and boxes, a sample against boxes and size.

    python -m benchmarks.data_scale [--images 1000 10000 100000 1000000] [--boxes 1 10 100 1000] [--folder /tmp]

Data sets are made up: small JPEG files and random boxes, every file a hard link to one of a few (a million images are
two million names), written below --folder and removed. Each row runs in a process of its own. Peak memory is what it
holds beyond its imports. Seconds are of its processor: the machine may be shared; a quiet one takes no longer on one
core. The files are in the system's cache, as after a copy; on a cold disk the names have to be read first. A start is
all up to the first batch: names, index, check of the anchors, sixteen mosaics. The slope is the exponent of growth,
fitted over the rows: 1 is in proportion, 0 is not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from benchmarks.peak_memory import forget_peak, peak_kb
from benchmarks.report import cpu_name, heading, slope, table
from engine.parts import MOST_BOXES
from utils.autoanchor import check_anchors
from utils.dataloaders import create_dataloader
from utils.dataset import DetectionDataset, Draw
from utils.errors import ResourceError, run_cli
from utils.files import ROOT

OLD = 1_600_000_000  # long before the scan: such files may be taken from the cache
FOLDER = 10_000  # images in each
LINKS = 30_000  # names of one file; ext4 allows 65,000
CLASSES = 80
ANCHORS = np.array(
    [[(10, 13), (16, 30), (33, 23)], [(30, 61), (62, 45), (59, 119)], [(116, 90), (156, 198), (373, 326)]]
)


def make_set(root: Path, images: int, boxes: int, size: tuple[int, int] = (64, 48), kinds: int = 64) -> Path:
    """A data set below ``root`` whose pictures are ``size`` (w, h); returns its folder of images."""
    rng = np.random.default_rng(0)
    kinds = min(max(kinds, images // LINKS + 1), images)
    (root / "files").mkdir(parents=True)
    for kind in range(kinds):
        picture = cv2.resize(rng.integers(0, 256, (12, 16, 3), np.uint8), size, interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(root / "files" / f"{kind}.jpg"), picture)
        (root / "files" / f"{kind}.txt").write_text(label_text(rng, boxes))
        for suffix in ("jpg", "txt"):
            os.utime(root / "files" / f"{kind}.{suffix}", (OLD, OLD))
    for number in range(images):
        part = f"{number // FOLDER:04d}"
        if number % FOLDER == 0:
            for kind in ("images", "labels"):
                (root / kind / part).mkdir(parents=True)
        for kind, suffix in (("images", "jpg"), ("labels", "txt")):
            os.link(root / "files" / f"{number % kinds}.{suffix}", f"{root}/{kind}/{part}/{number:012d}.{suffix}")
    return root / "images"


def label_text(rng: np.random.Generator, boxes: int) -> str:
    """A label file of this many boxes, of sizes and shapes that the usual anchors fit."""
    centre = rng.uniform(0.25, 0.75, (boxes, 2))
    width = np.exp(rng.uniform(np.log(0.02), np.log(0.3), boxes))
    height = width * rng.uniform(0.6, 1.5, boxes)
    rows = zip(rng.integers(0, CLASSES, boxes), *centre.T, width, height)
    return "".join(f"{c} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for c, x, y, w, h in rows)


def change(images: Path, share: float) -> int:
    """Rewrite this share of the labels; returns how many."""
    names = sorted(images.glob("*/*.jpg"))[:: int(1 / share)]
    for name in names:
        label = Path(str(name).replace("/images/", "/labels/")).with_suffix(".txt")
        label.unlink()
        label.write_text("1 .5 .5 .2 .2\n")
        os.utime(label, (OLD + 1, OLD + 1))
    return len(names)


def child(task: dict) -> dict[str, float]:
    """One measurement, in a process of its own: a start, or training samples."""
    forget_peak()
    before = peak_kb()
    start = time.process_time()
    if task["do"] == "start":
        data = DetectionDataset(task["folder"], 640, augment=True, nc=CLASSES, show=False)
        rng = np.random.default_rng(0)
        check_anchors(data.box_sizes(MOST_BOXES, rng), ANCHORS, np.array([8, 16, 32]), 4.0, 640, rng)
        next(iter(create_dataloader(data, 16, shuffle=True, workers=0)))
    else:
        cv2.setNumThreads(0)
        options = {"augment": True, "nc": CLASSES, "cache": task["cache"], "show": False}
        data = DetectionDataset(task["folder"], task["imgsz"], **options)
        return {"seconds": statistics.median(sample_seconds(data, epoch) for epoch in range(5))}
    seconds = time.process_time() - start
    return {"seconds": seconds, "mb": (peak_kb() - before) / 1024}


def sample_seconds(data: DetectionDataset, epoch: int, count: int = 64) -> float:
    """This process's own time for a training sample."""
    start = time.process_time()
    for first in range(0, count, 16):
        data.__getitems__([Draw(epoch, i % len(data)) for i in range(first, first + 16)])
    return (time.process_time() - start) / count


def measure(**task: object) -> dict[str, float]:
    """:func:`child` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.data_scale", "--child", json.dumps(task)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if done.returncode:
        raise ResourceError(f"a measuring process ended with status {done.returncode}: {done.stderr[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def starts(folder: Path, images: int, boxes: int) -> list[float]:
    """Seconds of a first scan, of a start from the cache and of one after 1 % of the labels changed; MB of the first
    two; MB of the cache."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        pictures = make_set(Path(root), images, boxes)
        first, again = (measure(do="start", folder=str(pictures)) for _ in range(2))
        change(pictures, 0.01)
        changed = measure(do="start", folder=str(pictures))
        cache = (Path(root) / "labels.cache.npz").stat().st_size / 1e6
    return [first["seconds"], again["seconds"], changed["seconds"], first["mb"], again["mb"], cache]


def by_count(folder: Path, counts: Sequence[int], boxes: int = 7) -> str:
    """The table of starts against the number of images."""
    found = [starts(folder, count, boxes) for count in counts]
    rows = [[f"{count:,}", *values] for count, values in zip(counts, found)]
    rows.append(["slope", *(slope(counts[1:], column[1:]) for column in zip(*found))])
    header = ["images", "first scan, s", "start, s", "1 % changed, s", "first scan, MB", "start, MB", "cache, MB"]
    return table(header, rows)


def by_boxes(folder: Path, counts: Sequence[int], images: int = 2000) -> str:
    """The table of starts and samples against boxes an image."""
    found = []
    for boxes in counts:
        first, again, _, mb, _, _ = starts(folder, images, boxes)
        with tempfile.TemporaryDirectory(dir=folder) as root:
            pictures = make_set(Path(root), 64, boxes, (640, 480))
            sample = measure(do="samples", folder=str(pictures), imgsz=640, cache="ram")["seconds"]
        found.append([first / images * 1e6, again / images * 1e6, mb, sample * 1e3])
    rows = [[f"{boxes:,}", *values] for boxes, values in zip(counts, found)]
    rows.append(["slope", *(slope(counts, column) for column in zip(*found))])
    header = ["boxes an image", "first scan, µs/image", "start, µs/image", f"MB for {images:,}", "sample from RAM, ms"]
    return table(header, rows)


def by_size(folder: Path, sizes: Sequence[int]) -> str:
    """The table of samples against the side of the training image, for pictures of that width."""
    found = []
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as root:
            pictures = str(make_set(Path(root), 64, 7, (size, size * 3 // 4), kinds=16))
            tasks = [dict(do="samples", folder=pictures, imgsz=size, cache=cache) for cache in ("", "ram")]
            found.append([measure(**task)["seconds"] * 1e3 for task in tasks])
    rows = [[size, *values] for size, values in zip(sizes, found)]
    rows.append(["slope", *(slope(sizes, column) for column in zip(*found))])
    return table(["side, px", "sample from files, ms", "sample from RAM, ms"], rows)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="*", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--boxes", type=int, nargs="*", default=[1, 10, 100, 1000], help="boxes an image")
    parser.add_argument("--imgsz", type=int, nargs="*", default=[320, 640, 960, 1280], help="sides in pixels")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the data sets go")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return
    print(heading(cpu_name()))
    for values, make in ((args.images, by_count), (args.boxes, by_boxes), (args.imgsz, by_size)):
        if values:
            print(make(args.folder, values) + "\n", flush=True)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
