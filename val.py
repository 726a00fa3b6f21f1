"""Measure a trained detector: precision, recall, mAP and COCO AP on a labelled split.

    python val.py --weights runs/train/exp/weights/best.pt --data bccd.yaml
    python val.py --weights best.pt --data mine.yaml --task test --save-txt --save-json
    python val.py --weights best.pt --data mine.yaml --task study         # accuracy and speed over image sizes

Results go to runs/val/exp, exp2, ...: curves, confusion_matrix.png, pictures of the first batches.
This file is the command line; the pass over the data is engine/evaluator.py.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
from utils.config import DataConfig
from utils.errors import ConfigError, end_process, is_installed, run_cli
from utils.files import ROOT
from utils.gc_pause import lasting_imports

if TYPE_CHECKING:
    import torch
    from torch import nn

    from utils.helpers import Helpers
    from utils.metrics import Metrics

TASKS = ("train", "val", "test", "speed", "study")
STUDY_SIZES = range(256, 1537, 128)
MOST_IN_GRAPHS, BATCHES_IN_GRAPHS = 8, 40
"""By default a batch of up to so many images is replayed as a CUDA graph; a larger one, which keeps a GPU busy for
longer than it takes to launch, where so many batches are of one shape: 52 batches of 32 images on an H200 took half a
second less with a graph, the recording included."""


def build_parser() -> Parser:
    """The flags, in the groups that --help shows."""
    parser = Parser(prog="val.py", description="Measure a detector on a labelled split.")
    inputs = parser.add_argument_group("model and data")
    add_weights_flag(inputs)
    inputs.add_argument("--data", default="data/coco128.yaml", help="dataset YAML (default: %(default)s)")
    task = "split to measure; speed: times alone; study: val over image sizes 256 to 1536 (default: val)"
    inputs.add_argument("--task", choices=TASKS, default="val", help=task)
    image_size_flag(inputs)
    inputs.add_argument("--batch-size", type=int, default=32, help="images a batch (default: %(default)s)")
    inputs.add_argument("--workers", type=int, default=8, help="data loading processes, at most (default: %(default)s)")
    add_dcn_backend_flag(inputs)
    inputs.add_argument("--single-cls", action="store_true", help="treat all classes as one")

    # a higher --conf-thres cuts the curves short
    graphs = f"on a GPU, for batches up to {MOST_IN_GRAPHS} or from {BATCHES_IN_GRAPHS} of one shape, and for NMS"
    add_detection_flags(parser.add_argument_group("detection"), conf=0.001, iou=0.6, max_det=300, graphs=graphs)

    output = parser.add_argument_group("what to write")
    output.add_argument("--verbose", action="store_true", help="one row a class even with 50 classes or more")
    add_label_file_flags(output)
    hybrid = "labels join the detections before NMS and --save-txt: inflates every score"
    output.add_argument("--save-hybrid", action="store_true", help=hybrid)
    output.add_argument("--save-json", action="store_true", help="WEIGHTS_predictions.json in COCO's format")
    output.add_argument("--noplots", action="store_true", help="draw no pictures")
    add_run_flags(parser, "runs/val")
    return parser


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Flags to a namespace, checked as far as that goes without the model. Raises ConfigError, CheckpointError."""
    args = build_parser().parse_args(argv)
    for flag, value, least in (
        ("--batch-size", args.batch_size, 1),
        ("--imgsz", args.imgsz, 32),
        ("--workers", args.workers, 0),
    ):
        if value < least:
            raise ConfigError(f"{flag} {value}: must be at least {least}")
    args.save_txt |= args.save_hybrid
    args.amp_dtype = None  # float32, until the device is known
    check_detection_flags(args)
    if args.task == "speed":
        args.conf_thres, args.iou_thres = 0.25, 0.45
    return args


def main(argv: Sequence[str]) -> int:
    """Measure what the flags say and print the table. Returns 0; raises UserError for wrong input."""
    measure(parse_args(argv))
    return 0


def run(**kwargs: Any) -> Metrics:
    """The same from Python: ``run(weights="best.pt", data="bccd.yaml", imgsz=640)``, the flags in underscore form.

    Returns the Metrics; with ``task="study"`` those of the last image size of the last weights file.
    """
    return measure(parse_args(keywords_to_argv(build_parser(), kwargs)))


def measure(args: argparse.Namespace) -> Metrics:
    """Carry out one task. Only from here on is anything heavy imported: --help and a wrong flag answer at once."""
    data = DataConfig.load(args.data, args.single_cls)
    data.split(split_of(args))
    return carry_out(args, data)


def helpers_of(args: argparse.Namespace) -> AbstractContextManager[Helpers | None]:
    """Processes that draw the curves and compute COCO's numbers, if the task has any and there are cores for them."""
    from utils.coco_ap import prepare_evaluation
    from utils.cores import may_have_children
    from utils.curves import prepare_drawing
    from utils.helpers import Helpers, helper_count

    draws = not args.noplots and is_installed("matplotlib")
    counts = is_installed("faster_coco_eval") and helper_count() > 1
    if args.task in ("speed", "study") or not (draws or counts) or not may_have_children():
        return nullcontext()
    return Helpers(prepare=[prepare_drawing] * draws + [prepare_evaluation] * counts)


def carry_out(args: argparse.Namespace, data: DataConfig) -> Metrics:
    """:func:`measure`, data and flags being right."""
    with lasting_imports():
        import torch

        from models.surgery import use_dcn_backend
    from utils.console import LOGGER, setup_console
    from utils.device import few_threads, half_dtype, select_device
    from utils.files import new_run_dir

    setup_console()
    device = select_device(args.device)
    if args.task == "speed":
        args.half = device.type == "cuda"  # what a GPU is fastest in; nobody asked for it, so nothing is said
    args.amp_dtype = half_dtype(args.half, device, names_exported(args))
    uses_graphs(args, device)
    if not args.noplots and not is_installed("matplotlib"):
        LOGGER.warning("no curves and pictures are drawn: matplotlib is not installed (pip install matplotlib)")
        args.noplots = True
    for note in data.notes:
        LOGGER.warning(note)
    if args.conf_thres > 0.001 and args.task != "speed":
        LOGGER.warning(f"--conf-thres {args.conf_thres}: above 0.001 the curves end early and mAP is too low")
    if args.save_hybrid:
        LOGGER.warning("--save-hybrid: labels take part in NMS, so precision, recall and mAP are inflated")
    truth = coco_truth(args, data)
    with few_threads(device):
        models = [load(group, data, device, args) for group in weight_groups(args)]
        for model in models:
            use_dcn_backend(model, args.dcn_backend, device, args.amp_dtype or torch.float32)
        folder = new_run_dir(args.project, args.name, args.exist_ok)
        if args.task == "study":
            return study(args, data, models, device, folder)
        with helpers_of(args) as helpers:  # now, as processes that start make one that fills memory wait
            return validate(args, data, models[0], device, folder, helpers, truth)


def weight_groups(args: argparse.Namespace) -> list[list[str]]:
    """The files of each model: all together (an ensemble), or for a study one by one."""
    return [[weights] for weights in args.weights] if args.task == "study" else [args.weights]


def load(weights: list[str], data: DataConfig, device: torch.device, args: argparse.Namespace) -> nn.Module:
    """The model on its device. Raises ConfigError when its classes are not those of the data set, or when it is an
    exported file of one size and --task study or --augment ask for many."""
    from deploy.runtime import open_model
    from utils.console import LOGGER
    from utils.device import describe_device

    model = open_model(weights, device, args.cfg)
    if getattr(model, "suppresses", False):
        LOGGER.warning(f"{weights[0]}: has its own threshold and suppression inside: its mAP is not that of others")
    many = "--task study" if args.task == "study" else "--augment" if args.augment else ""
    if many and getattr(model, "imgsz", None):
        raise ConfigError(f"{many}: {weights[0]} takes one image size; export it with --dynamic")
    names = dict(model.names)
    LOGGER.info(f"{', '.join(weights)} on {describe_device(device)}")
    if args.single_cls:
        return model
    if len(names) != data.nc:
        raise ConfigError(
            f"{weights[0]} has {len(names)} classes ({_some(names)}) but {data.source} has {data.nc} "
            f"({_some(data.names)}): use the data set it was trained on, or --single-cls to ignore classes"
        )
    different = [f"{i}: {names.get(i)} / {name}" for i, name in data.names.items() if names.get(i) != name]
    if different:
        shown = ", ".join(different[:3])
        LOGGER.warning(f"class names of the weights and of {data.source} differ ({shown}): numbers decide")
    return model


def _some(names: dict[int, str]) -> str:
    return ", ".join(list(names.values())[:3]) + (", ..." if len(names) > 3 else "")


def validate(
    args: argparse.Namespace,
    data: DataConfig,
    model: nn.Module,
    device: torch.device,
    folder: Path,
    helpers: Helpers | None,
    truth: CocoTruth | None,
) -> Metrics:
    """One pass over the split, the table, and the files in ``folder``."""
    from engine.eval_outputs import BatchPictures, CocoCollector, LabelWriter, draw_now, save_curves
    from utils.coco import category_ids
    from utils.console import LOGGER, plural

    labels = LabelWriter(folder / "labels", args.save_conf) if args.save_txt else None
    collector = CocoCollector(data.names, category_ids(data.split(split_of(args)), data.nc))
    speed_only = args.task == "speed"
    pictures = None if speed_only or args.noplots else BatchPictures(folder, data.names)
    observers = [labels, None if speed_only else collector, pictures]
    on_last = None if speed_only else partial(collector.begin, truth and truth.content, helpers)
    metrics = one_pass(args, data, model, device, [observer for observer in observers if observer], on_last)
    LOGGER.info(metrics.table(data.names, args.verbose or data.nc < 50))
    if pictures:
        save_curves(metrics, data.names, folder, helpers.draw if helpers else draw_now)
    if not speed_only and (args.save_json or collector.is_coco):
        collector.save(folder / f"{Path(args.weights[0]).stem}_predictions.json")
    metrics = dataclasses.replace(metrics, coco=collector.stats())
    if metrics.coco:
        LOGGER.info(coco_line(metrics.coco, truth))
    if helpers:
        helpers.close()
    if pictures:
        pictures.close()
    LOGGER.info(metrics.speed_line())
    LOGGER.info(f"Results saved to {folder}")
    if labels:
        LOGGER.info(f"{plural(labels.files, 'label')} saved to {labels.folder}")
    return metrics


def split_of(args: argparse.Namespace) -> str:
    """The split that a task reads."""
    return args.task if args.task in ("train", "test") else "val"


class CocoTruth(NamedTuple):
    """COCO's own annotation file, which counts where it is, and not the labels."""

    file: Path
    content: Mapping[str, Any]


def coco_truth(args: argparse.Namespace, data: DataConfig) -> CocoTruth | None:
    """COCO's annotations, if the data set is COCO's val2017 and they are there. Raises DataError for a damaged file."""
    from utils.coco import COCO_CATEGORY_IDS, category_ids, load_annotations

    if args.task in ("speed", "study") or category_ids(data.split(split_of(args)), data.nc) != COCO_CATEGORY_IDS:
        return None
    name = "annotations/instances_val2017.json"
    places = [place for place in (data.root / name, ROOT.parent / "datasets/coco" / name) if place.is_file()]
    return CocoTruth(places[0], load_annotations(places[0])) if places else None


def coco_line(stats: Mapping[str, float], truth: CocoTruth | None) -> str:
    """COCO's numbers, which are against its annotation file or against the labels."""
    shown = ", ".join(f"{key} {stats[key]:.3f}" for key in ("AP50", "AP75", "AP_small", "AP_medium", "AP_large"))
    against = truth.file if truth else "the labels"
    return f"COCO AP {stats['AP']:.3f} ({shown}; pycocotools' definition, against {against})"


def one_pass(
    args: argparse.Namespace,
    data: DataConfig,
    model: nn.Module,
    device: torch.device,
    observers: Sequence[Any] = (),
    on_last: Callable[[], None] | None = None,
) -> Metrics:
    """Make the loader for ``args.imgsz`` and evaluate."""

    from engine.evaluator import evaluate
    from models.head import side_multiple
    from utils.console import LOGGER
    from utils.dataloaders import create_dataloader
    from utils.dataset import DetectionDataset

    stride = side_multiple(model.stride)
    imgsz = only_size(args, model) or -(-args.imgsz // stride) * stride
    if imgsz != args.imgsz:
        LOGGER.warning(
            f"--imgsz {args.imgsz}: taken as {imgsz}, a multiple of the stride {stride} that the model takes"
        )
    square = args.task == "speed" or only_size(args, model) is not None
    dataset = DetectionDataset(
        data.split(split_of(args)),
        imgsz,
        rect=not square,
        batch_size=args.batch_size,
        stride=stride,
        pad=0.0 if square else 0.5,
        single_cls=args.single_cls,
        names=data.names,
        prefix=split_of(args),
    )
    # processes that live on are not waited for at the end of the pass, and with one epoch load no more than it
    loader = create_dataloader(dataset, args.batch_size, workers=args.workers, patient=False)
    loader.batch_sampler.epochs = 1
    shapes = [imgsz] * len(loader) if dataset.batch_shapes is None else map(tuple, dataset.batch_shapes.tolist())
    most_alike = max(Counter(shapes).values(), default=0)
    forward = forward_of(model, device, args, most_alike)
    with closing(loader):
        return evaluate(
            forward,
            loader,
            device=device,
            names=data.names,
            conf_thres=args.conf_thres,
            iou_thres=args.iou_thres,
            max_det=args.max_det,
            single_cls=args.single_cls,
            amp_dtype=args.amp_dtype,
            hybrid=args.save_hybrid,
            overlap=args.cuda_graphs != "off" and args.task not in ("speed", "study"),  # these measure each stage
            observers=observers,
            on_last=on_last,
        )


def names_exported(args: argparse.Namespace) -> bool:
    """Whether --weights names an exported file."""
    from deploy.formats import format_of

    return any(map(format_of, args.weights))


def uses_graphs(args: argparse.Namespace, device: torch.device, batches: int = 0) -> bool:
    """Whether the model runs as CUDA graphs, given how many ``batches`` are of one shape. ConfigError where it cannot
    and was asked to."""
    from utils.device import graphs_allowed

    if args.cuda_graphs == "auto" and args.batch_size > MOST_IN_GRAPHS and batches < BATCHES_IN_GRAPHS:
        return False
    obstacle = "they are for checkpoints (.pt)" if names_exported(args) else ""
    return graphs_allowed(args.cuda_graphs, device, "--augment runs several sizes" if args.augment else obstacle)


def forward_of(
    model: nn.Module, device: torch.device, args: argparse.Namespace, batches: int
) -> Callable[[torch.Tensor], Any]:
    """What runs a batch: the model, with --augment several sizes of it, or its CUDA graphs (see uses_graphs)."""
    from models.tta import augmented_forward
    from utils.cuda_graphs import CudaGraphs

    if args.augment:
        return lambda images: (augmented_forward(model, images), None)
    return CudaGraphs(model) if uses_graphs(args, device, batches) else model


def only_size(args: argparse.Namespace, model: nn.Module) -> int | None:
    """The side of the square images that an exported file of one size takes; None for a model that takes any. Raises
    ConfigError for one that is no square."""
    height, width = getattr(model, "imgsz", None) or (None, None)
    if height != width:
        raise ConfigError(f"{args.weights[0]}: takes images of {height}x{width}, val.py needs a square or --dynamic")
    return height


def study(
    args: argparse.Namespace, data: DataConfig, models: list[nn.Module], device: torch.device, folder: Path
) -> Metrics:
    """Each model over STUDY_SIZES: study_DATA_WEIGHTS.txt (a row a size; a second best.pt is best-2) and study.png."""
    from utils.console import LOGGER
    from utils.curves import plot_study
    from utils.files import atomic_write
    from utils.safe_names import UniqueNames
    from utils.stages import STAGES

    curves: dict[str, list[list[float]]] = {}
    names = UniqueNames()
    for weights, model in zip(args.weights, models):
        stem, lines = names.take(Path(weights).stem), []
        for size in STUDY_SIZES:
            metrics = one_pass(argparse.Namespace(**{**vars(args), "imgsz": size}), data, model, device)
            speed = [metrics.speed.get(stage, 0.0) for stage in STAGES]
            lines.append(" ".join(f"{value:10.4g}" for value in (size, *metrics.row(), *speed)) + "\n")
            curves.setdefault(stem, []).append([size, metrics.map50, metrics.map, speed[1] + speed[2]])
            LOGGER.info(metrics.table(data.names, verbose=False))
        atomic_write(folder / f"study_{data.source.stem}_{stem}.txt", "".join(lines))
    if not args.noplots:
        plot_study(curves, folder / "study.png")
    LOGGER.info(f"Results saved to {folder}")
    return metrics


if __name__ == "__main__":
    end_process(run_cli(main))
