"""Train a detector, plain or with deformable convolutions, on your own images.

    python train.py --data bccd.yaml --cfg yolov5s-dcn.yaml --weights '' --img 640 --batch 16 --epochs 100
    python train.py --data mine.yaml --weights runs/train/exp/weights/best.pt       # start from trained weights
    python train.py --resume                                                        # go on where a run stopped
    torchrun --nproc_per_node 4 train.py --data mine.yaml --cfg yolov5m.yaml --weights '' --batch 64

Results go to runs/train/exp, exp2, ...: weights/best.pt, weights/last.pt, results.csv, results.png and more.
This file is the command line; the training itself is engine/trainer.py.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace

from utils.cli import (
    Parser,
    add_cuda_graphs_flag,
    add_dcn_backend_flag,
    add_run_flags,
    check_weights,
    image_size_flag,
    keywords_to_argv,
)
from utils.config import DataConfig, Hyp, TrainConfig
from utils.errors import ConfigError, end_process, is_installed, run_cli
from utils.gc_pause import lasting_imports


def build_parser() -> Parser:
    """The flags, in the groups that --help shows."""
    parser = Parser(prog="train.py", description="Train a detector on your own images.")
    _add_model_flags(parser.add_argument_group("model"))
    _add_data_flags(parser.add_argument_group("data"))
    _add_schedule_flags(parser.add_argument_group("schedule"))
    _add_precision_flags(parser.add_argument_group("precision and repeatability"))
    _add_saving_flags(parser.add_argument_group("saving"))
    add_run_flags(parser, "runs/train")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=-1, help="ignored: torchrun tells ranks by environment"
    )
    return parser


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--weights", default="", help="checkpoint to start from; '' (default) trains from scratch, with --cfg"
    )
    group.add_argument(
        "--cfg", default="", help="model YAML, e.g. yolov5s.yaml or yolov5s-dcn.yaml; default: the checkpoint's own"
    )
    group.add_argument(
        "--dcn",
        default="",
        metavar="LAYERS",
        help="make these convolutions deformable, their weights and the model's output kept: layer numbers (1,3,5), "
        "c3:8 (the 3x3 ones inside layer 8), c3:6/3 (every third of them), backbone.last2, all3x3",
    )
    group.add_argument(
        "--freeze",
        nargs="+",
        type=int,
        default=[0],
        metavar="N",
        help="freeze layers 0..N-1, or exactly those listed (backbone: 10)",
    )
    group.add_argument(
        "--dcn-offset-lr",
        type=float,
        default=0.1,
        metavar="X",
        help="learning rate of the offset convolutions of DCN layers, as a share of the others' (default: 0.1)",
    )
    add_dcn_backend_flag(group)


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data", default="data/coco128.yaml", help="dataset YAML (default: %(default)s)")
    image_size_flag(group)
    group.add_argument("--rect", action="store_true", help="rectangular batches: no mosaic, no shuffling")
    group.add_argument(
        "--cache",
        nargs="?",
        const="ram",
        default="",
        choices=["ram", "disk", "val", ""],
        help="keep decoded images in ram (default when given alone) or on disk",
    )
    group.add_argument("--image-weights", action="store_true", help="draw images of weak classes more often")
    group.add_argument("--single-cls", action="store_true", help="treat all classes as one")
    group.add_argument("--multi-scale", action="store_true", help="vary the image size by +-50 %%")
    group.add_argument("--quad", action="store_true", help="quad collation: four images tiled into one")
    group.add_argument(
        "--close-mosaic", type=int, default=0, metavar="N", help="no mosaic in the last N epochs (default: 0)"
    )
    group.add_argument(
        "--workers", type=int, default=8, help="data loading processes per rank, at most (default: %(default)s)"
    )
    group.add_argument(
        "--augment-device",
        choices=["cpu", "gpu"],
        default="cpu",
        help="what recolours and mirrors images: the loader processes (cpu, default) or the GPU that trains",
    )
    group.add_argument(
        "--strict-data", action="store_true", help="faulty labels or images are an error instead of a warning"
    )
    group.add_argument("--check-data", action="store_true", help="print a report on the data set and stop")


def _add_schedule_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--hyp", default="data/hyps/hyp.scratch-low.yaml", help="hyper-parameters (default: %(default)s)"
    )
    group.add_argument("--epochs", type=int, default=100, help="total epochs (default: %(default)s)")
    group.add_argument(
        "--batch-size",
        type=int,
        default=16,
        help="images a step, over all GPUs; -1 finds the largest that fits (default: %(default)s)",
    )
    group.add_argument(
        "--optimizer",
        choices=["SGD", "Adam", "AdamW"],
        default="SGD",
        help="(default: %(default)s); lower lr0 to 0.001 for Adam",
    )
    group.add_argument("--cos-lr", action="store_true", help="cosine instead of linear decay")
    group.add_argument("--label-smoothing", type=float, default=0.0, metavar="EPS", help="(default: 0)")
    group.add_argument(
        "--patience",
        type=int,
        default=100,
        metavar="N",
        help="stop after N epochs without gain; 0 never (default: %(default)s)",
    )
    group.add_argument(
        "--clip-grad",
        type=float,
        default=10.0,
        metavar="NORM",
        help="largest gradient norm, of DCN offset branches and of the rest apart; 0 does not clip (default: 10)",
    )
    group.add_argument("--noautoanchor", action="store_true", help="keep the model's anchors even when they fit badly")


def _add_precision_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--amp",
        choices=["auto", "bf16", "fp16", "off"],
        default="auto",
        help="mixed precision; auto: bf16 or fp16 on a GPU, off on the CPU",
    )
    add_cuda_graphs_flag(group, "training steps", "on GPUs, but not with --sync-bn over several")
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the training step: a minute or two at the start, faster steps; needs a C++ compiler",
    )
    group.add_argument(
        "--ddp-timeout",
        type=float,
        default=45.0,
        metavar="SECONDS",
        help="several processes: one that is silent, or stands still among the batches, for so long is given up; 0: "
        "never (default: %(default)g)",
    )
    group.add_argument("--sync-bn", action="store_true", help="BatchNorm statistics over all ranks (several GPUs)")
    group.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    group.add_argument("--deterministic", action="store_true", help="repeatable kernels where they exist; slower")


def _add_saving_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        default="",
        metavar="LAST.PT",
        help="go on with this run, or with the newest; --epochs may be raised",
    )
    group.add_argument("--nosave", action="store_true", help="write checkpoints only at the end")
    group.add_argument("--noval", action="store_true", help="validate only after the last epoch")
    group.add_argument("--noplots", action="store_true", help="draw no pictures")
    group.add_argument("--save-period", type=int, default=-1, metavar="N", help="also keep epochN.pt every N epochs")
    group.add_argument(
        "--keep", type=int, default=0, metavar="N", help="of those, keep the newest N only; 0 keeps all (default)"
    )
    group.add_argument(
        "--on-nan",
        choices=["stop", "rollback"],
        default="stop",
        help="when the loss is NaN or infinite: stop (default), or go back to the last checkpoint with a tenth of the "
        "learning rate, three times at most; either says at which step and in which layer it began",
    )


NOT_SETTINGS = {"check_data", "debug", "local_rank"}


def main(argv: Sequence[str]) -> int:
    """Check everything that was asked, then train. Returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    settings = {k: v for k, v in vars(args).items() if k not in NOT_SETTINGS}
    if not args.resume and "TORCHELASTIC_RUN_ID" in os.environ:
        from engine.resume import run_to_take_up

        settings["resume"] = run_to_take_up(args.project)  # torchrun started us anew: a process or a machine was lost
    if settings["resume"]:
        from engine.resume import resumed_settings

        settings = resumed_settings(settings, parser.given(argv))
    cfg = TrainConfig(**{**settings, "freeze": tuple(settings["freeze"])})
    if not args.check_data and not cfg.weights and not cfg.cfg:
        raise ConfigError("nothing to train: give --cfg yolov5s.yaml (or yolov5s-dcn.yaml), --weights best.pt, or both")
    data = DataConfig.load(cfg.data, cfg.single_cls)
    if args.check_data:
        from utils.check_data import print_report

        return print_report(data)
    if cfg.weights and not cfg.resume:  # a resumed run no longer needs what it started from
        check_weights(cfg.weights)
    hyp, missing = Hyp.load(cfg.hyp)

    with lasting_imports():
        from engine.trainer import train

    notes = list(data.notes)
    if not cfg.noplots and not is_installed("matplotlib"):
        notes.append("no curves and pictures are drawn: matplotlib is not installed (pip install matplotlib)")
        cfg = replace(cfg, noplots=True)
    if missing:
        notes.append(f"{cfg.hyp}: not given, at their defaults: {', '.join(missing)}")
    train(cfg, hyp, data, notes)
    return 0


def run(**kwargs: object) -> int:
    """Train from Python: ``run(data="bccd.yaml", cfg="yolov5s-dcn.yaml", imgsz=320)``, the flags in underscore form."""
    return main(keywords_to_argv(build_parser(), kwargs))


if __name__ == "__main__":
    end_process(run_cli(main))
