"""A package of AOTInductor beside PyTorch: compiled, opened in a fresh process, compared, timed.

    python -m benchmarks.aoti --cfg yolov5x-dcn.yaml --half --device 0 --batch-sizes 1 8
    python -m benchmarks.aoti --weights data/demo/yolov5n-dcn-start.pt --img 320 --device cpu

With --cfg the weights are random, but norms follow a picture and DCN offsets are half a pixel or so. Milliseconds are
of one call, forward pass only, the median of several; on a GPU by CUDA events.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.report import cpu_name, heading, table
from deploy.checking import difference, input_batch
from deploy.exporter import ExportOptions, export, prepare
from deploy.formats import BY_NAME
from deploy.runtime import open_runtime
from models.common import DCN
from models.loading import load_model
from models.yolo import DetectionModel
from utils.checkpoint import save_checkpoint
from utils.device import describe_device, select_device
from utils.files import ROOT
from utils.images import read_image

WARM, TURNS = 5, 30
PICTURE = ROOT / "data" / "images" / "jockey.jpg"


def random_checkpoint(cfg: str, path: Path) -> Path:
    """A model of a YAML whose maps have the spread of a trained one's."""
    torch.manual_seed(0)
    model = DetectionModel(cfg)
    for module in model.modules():
        if isinstance(module, DCN):
            offsets = module.conv_offset_mask
            fan_in = math.prod(offsets.weight.shape[1:])
            nn.init.normal_(offsets.weight, std=0.5 / math.sqrt(fan_in))
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of the last batch
            # SiLU where it is nearly linear: a chaotic network would magnify every rounding
            nn.init.ones_(module.bias)
            nn.init.constant_(module.weight, 0.5)
    model.train()
    with torch.no_grad():
        model(input_batch(read_image(PICTURE), (320, 320), 2, torch.device("cpu")))
    names = {"yaml": model.yaml, "nc": model.nc, "names": [f"class{n}" for n in range(model.nc)]}
    save_checkpoint(path, model.state_dict(), names)
    return path


def milliseconds(model: nn.Module, images: torch.Tensor) -> float:
    """Of one call, the median."""
    times = []
    with torch.inference_mode():
        for _ in range(WARM + TURNS):
            if images.is_cuda:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                model(images)
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            else:
                begun = time.perf_counter()
                model(images)
                times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times[WARM:])


def measure(package: Path, weights: Path, device: torch.device, half: bool, batch: int) -> dict[str, float]:
    """In this process, which has not compiled it."""
    begun = time.perf_counter()
    runtime = open_runtime(package, device)
    seconds = time.perf_counter() - begun
    images = input_batch(read_image(PICTURE), runtime.meta.imgsz, batch, device)
    model = load_model(weights, device)
    with torch.inference_mode():
        exact = model(images)[0]
        own = difference(exact, runtime(images)[0])
        model = model.half() if half else model
        images = images.half() if half else images
        eager = difference(exact, model(images)[0].float())
    return {"open": seconds, "box": own.box, "score": own.score, "eager_box": eager.box, "eager_score": eager.score,
            "eager_ms": milliseconds(model, images), "ms": milliseconds(runtime, images)}  # fmt: skip


def row(args: argparse.Namespace, weights: Path, batch: int, folder: Path) -> list[object]:
    """Export for a batch size, then :func:`measure` in a fresh process."""
    options = ExportOptions(
        (args.imgsz, args.imgsz), batch, args.dynamic, args.half, dcn=args.dcn, folder=folder,
        device=select_device(args.device),
    )  # fmt: skip
    begun = time.perf_counter()
    package = export(prepare(weights, options, read_image(PICTURE)), BY_NAME["aoti"])
    seconds = time.perf_counter() - begun
    fresh = [sys.executable, "-X", "faulthandler", "-m", "benchmarks.aoti", *sys.argv[1:]]
    fresh += ["--measure", str(package), str(weights), str(batch)]
    done = subprocess.run(fresh, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(
            f"the fresh process ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        )
    found = json.loads(done.stdout.splitlines()[-1])
    size = package.stat().st_size / 1e6
    return [args.name, batch, f"{size:.0f}", seconds, found["open"], f"{found['box']:.2g} / {found['score']:.2g}",
            f"{found['eager_box']:.2g} / {found['eager_score']:.2g}", found["eager_ms"], found["ms"]]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="")
    parser.add_argument("--cfg", default="")
    parser.add_argument("--imgsz", "--img", type=int, default=640)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--dynamic", action="store_true")
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--dcn", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure", nargs=3, default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = select_device(args.device)
    if args.measure:
        package, weights, batch = args.measure
        print(json.dumps(measure(Path(package), Path(weights), device, args.half, int(batch))))
        return
    words = [Path(args.cfg or args.weights).stem, "half" * args.half, "dynamic" * args.dynamic, args.dcn]
    args.name = " ".join(word for word in words if word)
    with tempfile.TemporaryDirectory() as folder:
        weights = random_checkpoint(args.cfg, Path(folder) / "random.pt") if args.cfg else Path(args.weights)
        rows = [row(args, weights, batch, Path(folder)) for batch in args.batch_sizes]
    print(heading(describe_device(device) if device.type == "cuda" else cpu_name()))
    header = ["model", "batch", "MB", "export, s", "open, s", "px / confidence off", "the same of eager", "eager, ms"]
    print(table([*header, "package, ms"], rows))


if __name__ == "__main__":
    main()
