"""Find objects in pictures, folders, videos and streams.

    python detect.py --weights runs/train/exp/weights/best.pt --source photo.jpg
    python detect.py --weights best.pt --source folder/ --save-txt --save-crop      # also: 'a/**/*.png', list.txt
    python detect.py --weights best.pt --source clip.mp4 --vid-stride 2 --batch-size 8
    python detect.py --weights best.onnx --source photo.jpg           # and the other formats of export.py
    python detect.py --weights best.pt --source 0                                   # webcam; rtsp://..., 'screen'

Results go to runs/detect/exp, exp2, ... Exit status: 0 all read, 1 something could not be read (the others were),
2 wrong input, 130 stopped by Ctrl-C. This file is the command line; the loop is engine/predictor.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.formats import format_of
from utils.cli import (
    Parser,
    add_dcn_backend_flag,
    add_detection_flags,
    add_label_file_flags,
    add_run_flags,
    add_weights_flag,
    check_detection_flags,
    image_size_flag,
    keywords_to_argv,
)
from utils.errors import ConfigError, end_process, run_cli
from utils.files import ROOT
from utils.gc_pause import lasting_imports

if TYPE_CHECKING:
    import torch


def build_parser() -> Parser:
    """The flags, in the groups that --help shows."""
    parser = Parser(prog="detect.py", description="Find objects in pictures, folders, videos and streams.")
    _add_input_flags(parser.add_argument_group("model and source"))
    _add_detection_flags(parser.add_argument_group("detection"))
    _add_output_flags(parser.add_argument_group("what to write"))
    _add_drawing_flags(parser.add_argument_group("looks"))
    add_run_flags(parser, "runs/detect")
    return parser


def _add_input_flags(group: argparse._ArgumentGroup) -> None:
    add_weights_flag(group)
    source = (
        "file, folder, glob, list.txt, list.streams, webcam number, URL of a stream, "
        "'screen [number] [left top width height]' (default: data/images)"
    )
    group.add_argument("--source", nargs="+", default=[str(ROOT / "data" / "images")], help=source)
    names = "take the class names from this dataset YAML instead of the checkpoint"
    group.add_argument("--data", default="", metavar="YAML", help=names)
    image_size_flag(group, nargs="+")
    add_dcn_backend_flag(group)
    batch = "frames that go through the model together, where their sizes agree (default: 1)"
    group.add_argument("--batch-size", type=int, default=1, metavar="N", help=batch)
    stride = "look at every N-th frame of videos and streams (default: 1)"
    group.add_argument("--vid-stride", type=int, default=1, metavar="N", help=stride)


def _add_detection_flags(group: argparse._ArgumentGroup) -> None:
    add_detection_flags(group, conf=0.25, iou=0.45, max_det=1000)
    group.add_argument("--classes", nargs="+", type=int, metavar="N", help="only these class numbers")
    agnostic = "boxes of different classes suppress each other too"
    group.add_argument("--agnostic-nms", action="store_true", help=agnostic)


def _add_output_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--nosave", action="store_true", help="no annotated pictures and videos")
    add_label_file_flags(group)
    form = "of --save-txt: 0 cx cy w h, 1 x1 y1 x2 y2 (default: 0)"
    group.add_argument("--save-format", type=int, choices=[0, 1], default=0, help=form)
    group.add_argument("--save-csv", action="store_true", help="predictions.csv: image name, class, confidence")
    group.add_argument("--save-crop", action="store_true", help="crops/CLASS/NAME.jpg: each detection cut out")
    group.add_argument("--visualize", action="store_true", help="feature maps of each layer, pictures and .npy")
    offsets = "offsets/NAME.jpg: where the DCN layers sample for the surest objects of each picture"
    group.add_argument("--show-offsets", action="store_true", help=offsets)
    group.add_argument("--update", action="store_true", help="afterwards drop the optimizer state from --weights")


def _add_drawing_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--view-img", action="store_true", help="show results in a window; q ends")
    width = "of the boxes; 0 follows the size of the picture (default: 0)"
    group.add_argument("--line-thickness", type=int, default=0, metavar="PIXELS", help=width)
    group.add_argument("--hide-labels", action="store_true", help="boxes without text")
    group.add_argument("--hide-conf", action="store_true", help="class names without confidence")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Flags to a namespace, checked as far as that goes without the model. Raises ConfigError, CheckpointError."""
    args = build_parser().parse_args(argv)
    if args.line_thickness < 0:
        raise ConfigError(f"--line-thickness {args.line_thickness}: expected 0 or more")
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size {args.batch_size}: expected 1 or more")
    exported = next((path for path in args.weights if format_of(path)), None)
    if exported and (args.update or args.visualize or args.show_offsets):
        flag = "--update" if args.update else "--visualize" if args.visualize else "--show-offsets"
        raise ConfigError(f"{flag}: works on checkpoints (.pt), and {exported} is none")
    check_detection_flags(args)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Detect; returns the exit status (see the top of this file). Raises UserError for wrong input."""
    args = parse_args(sys.argv[1:] if argv is None else argv)
    # Only from here on is anything heavy imported: --help and a wrong flag answer at once.
    with lasting_imports():
        from engine.offset_pictures import OffsetPictures
        from engine.predictor import closing_lines, predict
        from engine.window import Window
        from engine.writers import ResultWriter
    from utils.console import LOGGER, plural, setup_console
    from utils.device import few_threads, select_device
    from utils.files import new_run_dir
    from utils.sources import open_source

    setup_console()
    window = Window() if args.view_img else None
    device = select_device(args.device)
    with few_threads(device), open_source(args.source, args.vid_stride) as source:
        detector = open_detector(args, device)
        imgsz = detector.round_size(args.imgsz)
        options = output_options(args)
        folder = Path(args.project) / args.name
        saved = options.any_file or args.visualize or args.show_offsets
        if saved:
            folder = new_run_dir(args.project, args.name, args.exist_ok)
        with ResultWriter(folder, options, detector.names) as writer:
            features = folder if args.visualize else None
            offsets = OffsetPictures(detector, imgsz, folder) if args.show_offsets else None
            summary = predict(detector, source, writer, imgsz, window, features, offsets, args.batch_size)
        closing_lines(summary, writer, saved)
        if offsets and not offsets.written:
            LOGGER.warning("--show-offsets: nothing was detected, so there is no object to show offsets for")
    if window:
        window.close()
    if args.update:
        strip(args.weights)
    if source.failed:
        LOGGER.warning(f"{plural(len(source.failed), 'source')} could not be read, see the warnings above")
    return 130 if summary.interrupted else 1 if source.failed or not summary.frames else 0


def open_detector(args: argparse.Namespace, device: torch.device) -> Any:
    """The weights on the device, set up as the flags say. Raises ConfigError, CheckpointError."""
    from deploy.runtime import open_model
    from models.api import Detector
    from models.sampling import dcn_layers
    from models.surgery import use_dcn_backend
    from utils.console import LOGGER
    from utils.device import describe_device, graphs_allowed

    detector = Detector(
        open_model(args.weights, device, args.cfg),
        device,
        args.half,
        conf=args.conf_thres,
        iou=args.iou_thres,
        max_det=args.max_det,
        classes=args.classes,
        agnostic=args.agnostic_nms,
        augment=args.augment,
        cuda_graphs=graphs_allowed(args.cuda_graphs, device, graphs_obstacle(args)),
    )
    if args.show_offsets:
        dcn_layers(detector.model)
    if args.data:
        detector.names = names_from(args.data, len(detector.names))
    LOGGER.info(f"{', '.join(args.weights)} on {describe_device(detector.device)}")
    use_dcn_backend(detector.model, args.dcn_backend, detector.device, detector.dtype)
    imgsz = detector.round_size(args.imgsz)
    if list(imgsz) != [args.imgsz[0], args.imgsz[-1]]:
        fixed = "the only size that this file takes"
        why = fixed if detector.imgsz else f"rounded up to multiples of the stride {detector.stride}"
        LOGGER.warning(f"--imgsz is {imgsz[0]} {imgsz[1]}, {why}")
    return detector


def graphs_obstacle(args: argparse.Namespace) -> str:
    """Why the model cannot run as CUDA graphs, or ''."""
    looks_inside = {"--visualize": args.visualize, "--show-offsets": args.show_offsets, "--augment": args.augment}
    flag = next((flag for flag, given in looks_inside.items() if given), "")
    if flag:
        return f"{flag} runs the model layer by layer" if flag != "--augment" else "--augment runs several sizes"
    return "they are for checkpoints (.pt)" if any(format_of(path) for path in args.weights) else ""


def output_options(args: argparse.Namespace) -> Any:
    """What to write and how to draw it, an :class:`engine.writers.OutputOptions`."""
    from engine.writers import OutputOptions

    return OutputOptions(
        pictures=not args.nosave,
        text=args.save_txt,
        text_confidence=args.save_conf,
        corners=args.save_format == 1,
        table=args.save_csv,
        crops=args.save_crop,
        draw_labels=not args.hide_labels,
        draw_confidence=not args.hide_conf,
        thickness=args.line_thickness,
    )


def names_from(data: str, nc: int) -> dict[int, str]:
    """The class names of a dataset YAML. Raises ConfigError unless there are ``nc``."""
    from utils.config import DataConfig

    names = DataConfig.load(data).names
    if len(names) != nc:
        raise ConfigError(f"--data {data}: {len(names)} class names, but the model has {nc} classes")
    return names


def strip(weights: Sequence[str]) -> None:
    """Drop optimizer and other training state from the files, so that they are a quarter of the size."""
    from utils.checkpoint import strip_checkpoint

    for path in weights:
        strip_checkpoint(path)


def run(**kwargs: Any) -> int:
    """The same from Python: ``run(weights="best.pt", source="folder", save_txt=True)``. Returns the exit status."""
    return main(keywords_to_argv(build_parser(), kwargs))


if __name__ == "__main__":
    end_process(run_cli(main))
