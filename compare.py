"""Which model is better on your data, and is it worth its cost: train each under the same budget, several times.

    python compare.py --data mine.yaml --cfg yolov5s.yaml yolov5s-dcn.yaml --seeds 3 --epochs 100
    python compare.py --data mine.yaml --cfg yolov5s.yaml yolov5s-dcn.yaml --weights best.pt --jobs 3 -- --cos-lr
    python compare.py --resume                                            # go on with what was interrupted

The report goes to runs/compare/exp: report.md, report.html, report.csv (docs/compare.md says what they mean).
Flags after -- go to train.py. This file is the command line; the parts are in comparison/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import Parser, add_run_flags, image_size_flag
from utils.config import DataConfig
from utils.errors import ConfigError, run_cli

if TYPE_CHECKING:
    import torch

    from comparison.checks import Checked
    from comparison.plan import Folder, Plan


def build_parser() -> Parser:
    """The flags, in the groups that --help shows."""
    parser = Parser(
        prog="compare.py", description="Compare models on your data. Flags after -- go to train.py as they are."
    )
    what = parser.add_argument_group("what to compare, with which budget")
    what.add_argument("--data", default="", help="dataset YAML")
    what.add_argument(
        "--cfg", nargs="+", default=[], metavar="YAML", help="model YAMLs; the first is what others are compared with"
    )
    what.add_argument("--weights", default="", help="checkpoint that all start from (default: from scratch)")
    what.add_argument("--seeds", type=int, default=3, help="trainings of each model (default: %(default)s)")
    what.add_argument("--epochs", type=int, default=100, help="of each training (default: %(default)s)")
    what.add_argument("--batch-size", type=int, default=16, help="images a step (default: %(default)s)")
    image_size_flag(what)
    how = parser.add_argument_group("how to go about it")
    how.add_argument("--jobs", type=int, default=1, help="trainings at a time (default: %(default)s)")
    how.add_argument(
        "--workers", type=int, default=8, help="data loading processes of each training (default: %(default)s)"
    )
    how.add_argument(
        "--resume", nargs="?", const="auto", default="", metavar="DIR",
        help="go on with the comparison in this folder, or with the newest; --seeds and --cfg may add to it",
    )  # fmt: skip
    judging = parser.add_argument_group("judging")
    judging.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="resamples of the images (default: %(default)s)"
    )
    judging.add_argument(
        "--points-per-doubling", type=float, default=3.0, metavar="X",
        help="points of mAP50-95 that twice the time must bring to be worth it (default: %(default)s)",
    )  # fmt: skip
    add_run_flags(parser, "runs/compare")
    return parser


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Flags to a namespace, with ``extra``, the words after ``--``, and ``given``, the names really on the command
    line; checked as far as that goes without files. Raises ConfigError."""
    parser, argv, extra = build_parser(), list(argv), []
    if "--" in argv:
        cut = argv.index("--")
        argv, extra = argv[:cut], argv[cut + 1 :]
    args = parser.parse_args(argv)
    args.extra, args.given = extra, parser.given(argv)
    for flag, least in (("jobs", 1), ("workers", 0), ("bootstrap", 100), ("imgsz", 32)):
        if getattr(args, flag) < least:
            raise ConfigError(f"--{flag} {getattr(args, flag)}: at least {least}")
    if not 0 <= args.points_per_doubling < 100:
        raise ConfigError(f"--points-per-doubling {args.points_per_doubling}: from 0 to 100")
    if not args.resume and not (args.data and args.cfg):
        raise ConfigError("nothing to compare: give --data mine.yaml --cfg yolov5s.yaml yolov5s-dcn.yaml, or --resume")
    if args.resume and (wrong := sorted(args.given & {"project", "name", "exist_ok"})):
        raise ConfigError(f"--{wrong[0].replace('_', '-')}: --resume goes on in the folder that it names")
    return args


def main(argv: Sequence[str]) -> int:
    """Check everything that was asked, train, measure, report. Returns 0, or 1 when trainings failed."""
    args = parse_args(argv)
    from comparison.plan import Folder, begin, newest_comparison, open_folder, read_plan

    folder = None
    if args.resume:
        path = newest_comparison(Path(args.project)) if args.resume == "auto" else Path(args.resume)
        folder, plan = Folder(path), grown(read_plan(path), args, path)
    else:
        plan = plan_from(args)
        path = Path(args.project) / args.name
        if args.exist_ok and (path / "compare.yaml").is_file():
            folder, plan = Folder(path), grown(read_plan(path), args, path)

    from comparison.checks import check_all
    from utils.console import LOGGER, setup_console
    from utils.device import select_device

    devices = tuple(device.strip() for device in args.device.split(","))
    setup_console()
    device = [select_device(device) for device in devices][0]
    if len(plan.cfg) == 1:
        LOGGER.warning(f"--cfg: {plan.models[0]} is alone; --resume --cfg OTHER.yaml adds a model to compare")
    checked = check_all(plan, device)
    with folder or open_folder(args.project, args.name, args.exist_ok) as folder:
        begin(folder, plan)
        return conduct(args, argv, plan, folder, checked, devices, device)


def plan_from(args: argparse.Namespace) -> Plan:
    """The plan that the flags describe, files found and named by absolute path. Raises ConfigError, DataError."""
    from comparison.checks import check_extra, resolve_models
    from comparison.plan import Plan
    from utils.cli import check_weights

    check_extra(args.extra)
    if args.weights:
        check_weights(args.weights)
    return Plan(
        data=str(DataConfig.load(args.data).source.resolve()),
        cfg=resolve_models(args.cfg),
        seeds=args.seeds,
        epochs=args.epochs,
        batch_size=args.batch_size,
        imgsz=args.imgsz,
        weights=str(Path(args.weights).resolve()) if args.weights else "",
        extra=tuple(args.extra),
    )


def grown(stored: Plan, args: argparse.Namespace, path: Path) -> Plan:
    """The stored plan with the models and seeds that the flags add. Raises ConfigError when they ask for another
    budget."""
    from comparison.plan import merged

    told = vars(args) | {"data": args.data or stored.data, "cfg": args.cfg or list(stored.cfg)}
    for name in ("seeds", "epochs", "batch_size", "imgsz", "weights"):
        if name not in args.given:
            told[name] = getattr(stored, name)
    told["extra"] = args.extra or list(stored.extra)
    return merged(stored, plan_from(argparse.Namespace(**told)), path)


def conduct(
    args: argparse.Namespace,
    argv: Sequence[str],
    plan: Plan,
    folder: Folder,
    checked: Checked,
    devices: tuple[str, ...],
    device: torch.device,
) -> int:
    """Train what is left to train, measure what is finished, write and print the report."""
    from comparison.trainings import Settings, train_all
    from utils.console import LOGGER, plural

    failed = train_all(plan, folder, Settings(args.jobs, devices, args.workers))

    from comparison.measuring import measure, write

    result = measure(
        plan,
        folder,
        checked,
        device,
        args.workers,
        command=argv,
        resamples=args.bootstrap,
        points_per_doubling=args.points_per_doubling,
        jobs=args.jobs,
        failed=list(failed.values()),
    )
    files = write(result, folder)
    LOGGER.info("\n" + files[0].read_text(encoding="utf-8"))
    LOGGER.info("\n".join(["Reports:", *map(str, files)]))
    for verdict in result.verdicts:
        LOGGER.info(verdict.text)
    if failed:
        LOGGER.warning(
            f"{plural(len(failed), 'training')} of {len(plan.runs)} failed and is not in the report; "
            f"try again with: python compare.py --resume {folder.path}"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
