"""Turn a trained detector into files that other programs run, each checked against PyTorch on a picture.

    python export.py --weights best.pt --include onnx                      # best.onnx beside it
    python export.py --weights best.pt --include onnx torchscript --dynamic --batch-size 4 --img 640
    python export.py --weights best.pt --include onnx --dcn gridsample --half
    python export.py --weights best.pt --include wts                       # as gen_wts.py
    python export.py --list                                                # the formats, and which can be had here

The files run in detect.py and val.py with --weights. Exit status: 0 all written and the same, 2 otherwise; nothing is
left half-written. This file is the command line; the work is in deploy/.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.formats import Format, chosen, table
from utils.cli import Parser, check_weights, image_size_flag, keywords_to_argv
from utils.config import check_thresholds
from utils.errors import CheckpointError, ConfigError, DataError, run_cli
from utils.files import ROOT
from utils.gc_pause import lasting_imports

if TYPE_CHECKING:
    import numpy as np

    from utils.config import DataConfig

CALIBRATED_ON = 128
"""Pictures of --int8."""


def build_parser() -> Parser:
    """The flags, in the groups that --help shows."""
    parser = Parser(prog="export.py", description="Turn a trained detector into files that other programs run.")
    inputs = parser.add_argument_group("model")
    inputs.add_argument("--weights", default="yolov5s.pt", metavar="PT", help="checkpoint (default: yolov5s.pt)")
    inputs.add_argument("--cfg", default="", metavar="YAML", help="model YAML, for a .wts or a bare state dict")
    what = "formats, see --list (default: onnx)"
    inputs.add_argument("--include", nargs="+", default=["onnx"], metavar="FORMAT", help=what)
    inputs.add_argument("--list", action="store_true", help="show the formats and which are available here")

    shape = parser.add_argument_group("input of the exported model")
    image_size_flag(shape, nargs="+")
    shape.add_argument("--batch-size", type=int, default=1, metavar="N", help="images at once (default: 1)")
    shape.add_argument("--dynamic", action="store_true", help="any batch and any size, multiples of the stride")
    shape.add_argument("--half", action="store_true", help="float16 weights and input; DCN still samples in float32")

    int8 = "ONNX in eight bits, for CPUs: needs --data; the head and DCN layers stay in float32"
    shape.add_argument("--int8", action="store_true", help=int8)

    form = parser.add_argument_group("form")
    form.add_argument("--opset", type=int, metavar="N", help="of ONNX (default: 19 with DeformConv, else 18)")
    dcn = "DCN layers as one operator, from GridSample where a runtime lacks it, or by the kernel of training, in aoti "
    dcn += "on a GPU (default: deformconv; in aoti gridsample or fused)"
    form.add_argument("--dcn", choices=["deformconv", "gridsample", "fused"], default="", help=dcn)
    form.add_argument("--nms", action="store_true", help="suppression inside the file (ONNX): rows of detections")
    form.add_argument("--conf-thres", type=float, default=0.25, metavar="P", help="of --nms (default: %(default)s)")
    form.add_argument("--iou-thres", type=float, default=0.45, metavar="IOU", help="of --nms (default: %(default)s)")
    form.add_argument("--max-det", type=int, default=100, metavar="N", help="of --nms, a class (default: 100)")

    run = parser.add_argument_group("run")
    run.add_argument("--output", default="", metavar="DIR", help="folder for the files (default: beside the weights)")
    image = "picture to compare on, without --int8 (default: one of data/images)"
    run.add_argument("--image", default=str(ROOT / "data" / "images" / "jockey.jpg"), metavar="FILE", help=image)
    data = "of --int8: the data set whose training pictures it is calibrated on"
    run.add_argument("--data", default="", metavar="YAML", help=data)  # old command lines have it without: no matter
    run.add_argument("--simplify", action="store_true", help=argparse.SUPPRESS)  # torch's exporter does so itself
    run.add_argument("--device", default="cpu", help="where to trace and compare: cpu, 0, ... (default: cpu)")
    run.add_argument("--debug", action="store_true", help="show a traceback instead of a one-line error")
    return parser


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Flags to a namespace, checked as far as that goes without the model. Raises ConfigError, CheckpointError."""
    args = build_parser().parse_args(argv)
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size {args.batch_size}: must be at least 1")
    if len(args.imgsz) > 2 or min(args.imgsz) < 1:
        sizes = " ".join(map(str, args.imgsz))
        raise ConfigError(f"--imgsz {sizes}: expected one size or height and width, in pixels")
    check_thresholds(args.conf_thres, args.iou_thres, args.max_det)
    if args.nms and "onnx" not in args.include:
        raise ConfigError("--nms: goes into ONNX files only; add onnx to --include")
    if args.int8 and not args.data:
        raise ConfigError("--int8: needs --data YAML, a data set whose training pictures it is calibrated on")
    return args


def calibration_pictures(data: DataConfig, imgsz: tuple[int, int]) -> list[np.ndarray]:
    """Up to CALIBRATED_ON training pictures, the same ones each time, uint8 (H, W, 3) RGB of the file's input size;
    those that cannot be read are left out with a warning. Raises DataError where there is none."""
    from utils.augmentations import letterbox
    from utils.console import LOGGER
    from utils.images import list_images, read_image

    files = list_images(data.split("train"))
    random.Random(0).shuffle(files)
    pictures = []
    for file in files:
        try:
            pictures.append(letterbox(read_image(file), imgsz, auto=False)[0])
        except DataError as error:
            LOGGER.warning(f"{error}; --int8 does without it")
        if len(pictures) == CALIBRATED_ON:
            break
    if not pictures:
        raise DataError(f"--int8: {data.source}: its training split has no picture to calibrate on")
    return pictures


def formats_of(args: argparse.Namespace) -> list[Format]:
    """What --include asks for. Raises ConfigError, MissingPackage."""
    formats = chosen(args.include)
    check_weights(args.weights)
    if not args.weights.endswith((".pt", ".pth", ".wts")):
        raise CheckpointError(f"--weights {args.weights}: export starts from a checkpoint (.pt) or a .wts")
    return formats


def main(argv: Sequence[str]) -> int:
    """Export what the flags say. Returns 0; raises UserError for wrong input and for exports that differ."""
    args = parse_args(argv)
    if args.list:
        print(table())
        return 0
    export_all(args)
    return 0


def export_all(args: argparse.Namespace) -> list[Path]:
    """The files written. Only from here on is anything heavy imported: --help and a wrong flag answer at once."""
    formats = formats_of(args)

    with lasting_imports():
        from deploy.exporter import ExportOptions, check_options, export, prepare
    from utils.config import DataConfig
    from utils.console import LOGGER, setup_console
    from utils.device import select_device
    from utils.images import read_image

    setup_console()
    imgsz = (args.imgsz[0], args.imgsz[-1])
    data = DataConfig.load(args.data) if args.int8 else None
    options = ExportOptions(
        imgsz=imgsz,
        batch=args.batch_size,
        dynamic=args.dynamic,
        half=args.half,
        opset=args.opset,
        dcn=args.dcn,
        nms=args.nms,
        conf=args.conf_thres,
        iou=args.iou_thres,
        max_det=args.max_det,
        folder=Path(args.output) if args.output else None,
        device=select_device(args.device),
        calibration=calibration_pictures(data, imgsz) if data else None,
    )
    job = prepare(args.weights, options, read_image(args.image), args.cfg or None)
    for kind in formats:
        check_options(job, kind)
    if data and list(data.names.values()) != list(job.plain.names.values()):
        LOGGER.warning(f"--int8: {data.source} has other classes than the model: was it trained on this set?")
    written = [export(job, kind) for kind in formats]
    runnable = [str(path) for path, kind in zip(written, formats) if kind.runs]
    if runnable:
        LOGGER.info(f"To run: python detect.py --weights {runnable[0]} --source data/images")
    return written


def run(**kwargs: Any) -> list[Path]:
    """The same from Python: ``run(weights="best.pt", include=["onnx"], dynamic=True)``. Returns the files."""
    return export_all(parse_args(keywords_to_argv(build_parser(), kwargs)))


if __name__ == "__main__":
    sys.exit(run_cli(main))
