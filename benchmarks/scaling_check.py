"""Whether N GPUs learn what one learns, and find what one finds: loss curves at one total batch, validation in shares.

    python -m benchmarks.scaling_check --gpus 1 2 --data bccd.yaml --cfg yolov5s-dcn --batch 32 --epochs 5
    python -m benchmarks.scaling_check --gpus 1 2 --cfg yolov5n --imgsz 64 --batch 8 --epochs 1 --device cpu

train.py by torchrun, for each number of GPUs, without augmentation, in float32, with BatchNorm over all ranks (on a
CPU, where torch has no such BatchNorm, each rank for itself). The same images make up a step whatever the number of
GPUs; what remains different is that each rank divides its losses by its own number of matched boxes, and rounding.

Then best.pt of the largest number is validated by all ranks together and by rank 0 alone, with the same batches.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.launch import check_files, torchrun
from benchmarks.report import table
from utils.errors import run_cli
from utils.files import ROOT

PLAIN = dict.fromkeys(
    ("hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale", "shear", "perspective", "flipud", "fliplr", "mosaic")
    + ("mixup", "copy_paste"),
    0.0,
)
CURVES = ("train/box_loss", "train/obj_loss", "train/cls_loss", "val/box_loss", "val/obj_loss", "metrics/mAP_0.5:0.95")


def train_once(gpus: int, args: argparse.Namespace, hyp: Path, project: Path) -> list[dict[str, float]]:
    """One training; the rows of its results.csv."""
    flags = [
        "--data",
        args.data,
        "--cfg",
        f"{args.cfg}.yaml",
        "--weights",
        args.begin_with,
        "--hyp",
        str(hyp),
        "--img",
        str(args.imgsz),
    ]
    flags += ["--batch", str(args.batch), "--epochs", str(args.epochs), "--workers", str(args.workers), "--noplots"]
    flags += ["--amp", "off", "--cuda-graphs", args.cuda_graphs, "--noautoanchor", "--project", str(project)]
    flags += ["--name", f"{gpus}"]
    flags += ["--sync-bn"] if args.cuda_graphs == "off" else []
    flags += ["--device", args.device] if args.device else []
    torchrun(gpus, [str(ROOT / "train.py"), *flags], quiet=True)
    with (project / str(gpus) / "results.csv").open(newline="") as file:
        return [{key.strip(): float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def compare(curves: dict[int, list[dict[str, float]]]) -> str:
    """A table of every curve, epoch by epoch, and the largest difference of each."""
    first, *others = curves
    header = ["curve", "epoch", f"{first} GPU", *[f"{gpus} GPUs" for gpus in others], "largest difference"]
    lines = []
    for name in (name for name in CURVES if name in curves[first][0]):
        for epoch in range(len(curves[first])):
            values = [rows[epoch][name] for rows in curves.values()]
            shown = [f"{value:.5f}" for value in values]
            lines.append([name, epoch, *shown, f"{max(abs(value - values[0]) for value in values):.5f}"])
    return table(header, lines)


def validate(args: argparse.Namespace) -> None:
    """In each process: the checkpoint by all ranks, then by rank 0; rank 0 prints both."""
    from engine.evaluator import evaluate
    from models.loading import load_model
    from utils.config import DataConfig
    from utils.console import setup_console
    from utils.dataloaders import create_dataloader
    from utils.dataset import DetectionDataset
    from utils.device import select_device
    from utils.dist import World, close_distributed, init_distributed, main_first

    world = init_distributed(cuda=args.device != "cpu")
    setup_console(False)
    device = select_device(args.device, world.local_rank)
    data = DataConfig.load(args.data)
    with main_first(world):
        images = DetectionDataset(
            data.val,
            args.imgsz,
            rect=True,
            batch_size=args.val_batch,
            pad=0.5,
            nc=data.nc,
            names=data.names,
            show=False,
        )
    model = load_model(args.weights, device)
    rows = []
    for label, who in ((f"{world.size} ranks", world), ("one rank", World())):
        if who.size == world.size or world.main:
            loader = create_dataloader(images, args.val_batch, workers=args.workers, world=who)
            metrics = evaluate(model, loader, device=device, names=data.names, world=who, show_progress=False)
            if metrics is not None:
                rows.append([label, metrics.images, *[f"{value:.6f}" for value in metrics.row()[:4]]])
    if world.main:
        print(table(["validated by", "images", "P", "R", "mAP50", "mAP50-95"], rows), flush=True)
        same = rows[0][1:] == rows[-1][1:]
        near = all(abs(float(a) - float(b)) < 5e-5 for a, b in zip(rows[0][1:], rows[-1][1:]))
        print(f"Sharded validation: {'the same' if same else 'equal to 4 decimals' if near else 'NOT EQUAL'}")
    close_distributed(world)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--cfg", default="yolov5s-dcn")
    parser.add_argument("--begin-with", default="", metavar="FILE", help="weights to start from; default: random ones")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=32, help="images over all GPUs")
    parser.add_argument("--val-batch", type=int, default=16, help="images of a validation batch")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument(
        "--cuda-graphs", choices=["off", "on"], default="off", help="on: CUDA graphs, and BatchNorm of each rank alone"
    )
    parser.add_argument("--device", default="", choices=["", "cpu"])
    parser.add_argument("--keep", default="", metavar="FOLDER", help="leave the runs here")
    parser.add_argument("--weights", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.cfg = args.cfg.removesuffix(".yaml")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    if args.weights:
        return validate(args)
    check_files([args.cfg], args.data)
    from utils.config import Hyp
    from utils.files import dump_yaml

    with tempfile.TemporaryDirectory() as folder:
        project = Path(args.keep or folder)
        project.mkdir(parents=True, exist_ok=True)
        hyp = project / "hyp.plain.yaml"
        hyp.write_text(dump_yaml({**Hyp().to_dict(), **PLAIN}))
        curves = {gpus: train_once(gpus, args, hyp, project) for gpus in args.gpus}
        print(compare(curves), flush=True)
        most = args.gpus[-1]
        best = project / str(most) / "weights" / "best.pt"
        torchrun(most, ["-m", "benchmarks.scaling_check", *argv, "--weights", str(best)])


if __name__ == "__main__":
    sys.exit(run_cli(main))
