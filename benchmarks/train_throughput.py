"""Images per second and peak memory of the real training loop, loader included, beside upstream's.

    python -m benchmarks.train_throughput --data bccd.yaml --case yolov5s.yaml:16 yolov5s.yaml:64 yolov5s-dcn.yaml:16

The data set is listed --repeat times so that epochs are long; validation, saving and the first --warmup batches are
left out; time is read after synchronising. ``replay`` repeats eight batches from memory: the loop without a loader,
which is the limit for this loop. Upstream's figures: one H100 80GB, torch 2.11, 2026-11-24, 640 px, fp16, 8 workers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from itertools import count, cycle, islice
from pathlib import Path

import torch

from benchmarks.report import cpu_name, heading, table
from engine.epoch import Learner
from engine.parts import Frame, build_learner, build_loaders, build_model, frame_for
from models.yolo import DetectionModel
from utils.cli import add_dcn_backend_flag
from utils.config import DataConfig, Hyp, TrainConfig
from utils.console import setup_console
from utils.dataloaders import DetectionLoader
from utils.dataset import DetectionDataset
from utils.device import describe_device, seed_everything, select_device
from utils.dist import World

# (images/s with its loader, images/s replaying, peak GB allocated)
UPSTREAM = {
    ("yolov5n", 16): (None, 212, 1.51),
    ("yolov5s", 16): (215, 198, 2.89),
    ("yolov5s", 64): (303, 317, 10.84),
    ("yolov5x", 16): (96.5, 110, 12.94),
    ("yolov5s-dcn", 16): (None, 177, 3.13),
    ("yolov5x-dcn", 16): (78.9, 82.5, 13.44),
}


def long_list(data: DataConfig, repeat: int, folder: Path) -> Path:
    """A text list that names every training image ``repeat`` times, each time as a file of its own (a link)."""
    images = folder / "images"
    labels = folder / "labels"
    images.mkdir()
    labels.mkdir()
    for source in data.train:
        for image in sorted(p for p in source.rglob("*") if p.is_file()):
            label = Path(str(image).replace("/images/", "/labels/")).with_suffix(".txt")
            for copy in range(repeat):
                (images / f"{copy}_{image.name}").symlink_to(image)
                if label.is_file():
                    (labels / f"{copy}_{label.name}").symlink_to(label)
    return images


def steps(learner: Learner, batches: Iterator, synchronize) -> Iterator[tuple[int, float]]:
    """(images, seconds since the previous one) of each training step."""
    last = time.perf_counter()
    for index, batch in enumerate(batches):
        settings = learner.schedule.at(0, index)
        learner.schedule.apply(learner.optimizer, settings)
        images = batch.images.to(learner.device, non_blocking=True)
        learner.backward(images, batch.targets.to(learner.device, non_blocking=True))
        if settings.optimizer_step:
            learner.step()
        if index % 10 == 9:  # the trainer, too, reads its losses only now and then
            synchronize()
        now = time.perf_counter()
        yield len(batch.images), now - last
        last = now


def rate(learner: Learner, batches: Iterator, warmup: int) -> float:
    """Images per second over all steps but the first ``warmup``."""
    synchronize = torch.cuda.synchronize if learner.device.type == "cuda" else (lambda: None)
    timed = list(steps(learner, batches, synchronize))[warmup:]
    return sum(n for n, _ in timed) / sum(s for _, s in timed)


def model_and_frame(
    cfg: TrainConfig, data: DataConfig, hyp: Hyp, world: World, device: torch.device
) -> tuple[DetectionModel, Frame]:
    """The model on its device, the same random weights every time, and the sizes of its training."""
    seed_everything(1)
    model = build_model(cfg, hyp, data, device)
    return model, frame_for(cfg, model, world)


def measure(case: str, args: argparse.Namespace, device: torch.device) -> list[object]:
    """One row: loader, replay, memory, upstream, ratios."""
    name, batch = case.split(":")
    cfg = TrainConfig(
        cfg=name,
        data=args.data,
        batch_size=int(batch),
        imgsz=args.imgsz,
        workers=args.workers,
        amp=args.amp,
        dcn_backend=args.dcn_backend,
        cuda_graphs=args.cuda_graphs,
        compile=args.compile,
        augment_device=args.augment_device,
    )
    data, hyp, world = DataConfig.load(args.data), Hyp(), World()
    model, frame = model_and_frame(cfg, data, hyp, world, device)
    with tempfile.TemporaryDirectory() as folder:
        images = long_list(data, args.repeat, Path(folder))
        shared = dict(nc=data.nc, names=data.names, batch_size=frame.batch, show=False, cache=args.cache)
        train = DetectionDataset([images], frame.imgsz, hyp=hyp, augment=True, **shared)
        loader, _ = build_loaders(
            cfg, train, DetectionDataset(data.val, frame.imgsz, rect=True, **shared), frame, world, device
        )
        learner = build_learner(model, cfg, hyp, frame, len(loader), device, world)
        learner.model.train()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        total = args.warmup + args.steps
        real = rate(learner, islice(epochs_of(loader), total), args.warmup)
        memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
        held = [b for b in islice(loader, 8)]
        if device.type == "cuda":
            held = [b.to("cpu").pin_memory() for b in held]
        replay = rate(learner, islice(cycle(held), total), args.warmup)
    stem = name.removesuffix(".yaml")
    then, then_replay, then_memory = UPSTREAM.get((stem, int(batch)), (None, None, None))
    ratios = [f"{a / b:.2f}" if b else "-" for a, b in ((real, then), (replay, then_replay))]
    return [stem, batch, real, replay, memory, then or "-", then_replay or "-", then_memory or "-", *ratios]


def epochs_of(loader: DetectionLoader) -> Iterator:
    """The batches of one epoch after another, as the trainer asks for them: loaded ahead across their border."""
    for epoch in count():
        loader.set_epoch(epoch)
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--case", nargs="+", default=["yolov5s.yaml:16", "yolov5s.yaml:64"], metavar="CFG:BATCH")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--cache", default="", choices=["", "ram"])
    parser.add_argument("--amp", default="auto")
    parser.add_argument("--cuda-graphs", choices=["auto", "off"], default="auto")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step; says how long that took")
    parser.add_argument("--augment-device", choices=["cpu", "gpu"], default="cpu", help="who recolours and mirrors")
    add_dcn_backend_flag(parser)
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", default="")
    args = parser.parse_args()
    setup_console()
    device = select_device(args.device)
    header = ["model", "batch", "images/s", "replay, images/s", "peak GB"]
    header += ["upstream images/s", "upstream replay", "upstream GB", "ratio", "replay ratio"]
    rows = [measure(case, args, device) for case in args.case]
    print(heading(f"{describe_device(device)}; {cpu_name()}; {args.workers} workers"))
    print(table(header, rows))


if __name__ == "__main__":
    main()
