"""Why training with four DCN layers died: trains arms that differ in one thing, measures, judges the theories.

    python -m benchmarks.collapse --data bccd.yaml --arms core --steps 400 --out runs/collapse
    python -m benchmarks.collapse --data bccd.yaml --arms article+clip+norm default --seed 1 --out runs/collapse
    python -m benchmarks.collapse --report runs/collapse

An arm is a base and changes (--list). Each leaves a CSV in --out; one that has it already is passed over, so that a
command may be repeated, and several may fill one folder. All arms are trained on the same batches in the same order:
train.py's mosaics with its default hyper-parameters, made once and held in memory (on the GPU), so that no time goes
into decoding. Rates, warm-up, accumulation and decay are train.py's (the first steps of 300 epochs).
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from benchmarks.collapse.arms import Arm, listing, parse_arms
from utils.cli import Parser
from utils.errors import ConfigError, run_cli


def build_parser() -> Parser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="benchmarks.collapse", description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--data", default="", help="dataset YAML")
    parser.add_argument("--arms", nargs="+", default=["core"], help="names of arms or groups (default: core)")
    parser.add_argument("--base", default="", metavar="ARM", help="take the place of 'article' in groups; judge by it")
    parser.add_argument("--list", action="store_true", help="show bases, changes and groups")
    parser.add_argument("--report", default="", metavar="DIR", help="only draw and judge what a folder holds")
    parser.add_argument("--out", default="runs/collapse", metavar="DIR", help="records, report (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="iterations of an arm (default: %(default)s)")
    parser.add_argument("--every", type=int, default=5, help="iterations between records (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of start weights and batches (default: %(default)s)")
    parser.add_argument("--size", choices="nsmlx", default="x", help="size of the model (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images of a batch (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=48, help="different batches (default: %(default)s)")
    parser.add_argument("--img", type=int, default=640, help="pixels (default: %(default)s)")
    parser.add_argument("--device", default="", help="as train.py")
    parser.add_argument("--workers", type=int, default=8, help="processes that make the batches (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=0, help="no step after this time (default: no limit)")
    parser.add_argument("--parallel", type=int, default=1, metavar="K", help="processes that share the arms")
    parser.add_argument("--claims", default="", help=argparse.SUPPRESS)  # folder in which those processes agree
    return parser


def check(args: argparse.Namespace) -> dict[str, Arm]:
    """The arms. ConfigError for a flag out of range or an arm that is not there."""
    for flag in ("steps", "every", "batch", "batches", "parallel"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if args.img < 64 or args.img % 32:
        raise ConfigError(f"--img {args.img}: must be a multiple of 32, at least 64")
    if not args.data:
        raise ConfigError("--data: give a dataset YAML (or --report DIR for records that are there)")
    arms = parse_arms(args.arms)
    if args.base:
        arms = parse_arms([re.sub("^article", args.base, name) for name in arms])
    return arms


def main(argv: Sequence[str]) -> None:
    args = build_parser().parse_args(argv)
    if args.list:
        print(listing())
        return
    if args.report:
        from benchmarks.collapse.report import write_report

        print(write_report(Path(args.report), args.base))
        return
    arms = check(args)
    started = time.monotonic()
    if args.parallel > 1:
        _share(args.parallel, argv)
    else:
        run_arms(arms, args, started)
    if not args.claims:
        from benchmarks.collapse.report import write_report

        print(write_report(Path(args.out), args.base if args.base in arms else ""))


def _share(processes: int, flags: Sequence[str]) -> None:
    """Start the processes and wait for all of them."""
    with tempfile.TemporaryDirectory() as claims:
        command = [sys.executable, "-m", "benchmarks.collapse", *flags, "--parallel", "1", "--claims", claims]
        children = [subprocess.Popen(command) for _ in range(processes)]
        try:
            failed = [child.wait() for child in children]
        finally:  # after Ctrl-C or a timeout they would go on
            for child in children:
                child.terminate()
    if any(failed):
        print(f"benchmarks.collapse: processes ended with {failed}; the report is of what they left", file=sys.stderr)


def run_arms(arms: dict[str, Arm], args: argparse.Namespace, started: float) -> None:
    """Train the arms that have no record yet and that no other process has claimed."""
    import torch

    from benchmarks.collapse import material, record, training
    from utils.config import DataConfig
    from utils.device import describe_device, select_device

    device = select_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    todo = {name: arm for name, arm in arms.items() if not record.file_for(out, name, args.seed).exists()}
    if not todo:
        return
    batches = material.prepare(
        DataConfig.load(args.data), args.img, args.batch, args.batches, args.seed, args.workers, device
    )
    print(f"{len(batches)} batches in memory after {time.monotonic() - started:.0f} s", flush=True)
    deadline = started + args.minutes * 60 if args.minutes else float("inf")
    plan = training.Plan(f"yolov5{args.size}.yaml", args.steps, args.every, args.seed, device, deadline)
    for name, arm in todo.items():
        if time.monotonic() >= deadline:
            print(f"{name}: no time left", flush=True)
            continue
        if not _claimed(args.claims, name):
            continue
        gc.collect()  # the model before this one
        result = training.run_arm(arm, batches, plan, lambda step, row: None)
        meta = {
            "arm": name, "cfg": plan.cfg, "seed": args.seed, "imgsz": args.img, "batch": args.batch,
            "batches": len(batches), "steps": args.steps, "data": Path(args.data).parent.name or args.data,
            "device": describe_device(device), "torch": torch.__version__, "date": date.today().isoformat(),
            "dtype": result.dtype, "ended": result.ended, "seconds_per_step": round(result.seconds_per_step, 4),
            "layers": result.layers,
        }  # fmt: skip
        header = [*record.STEP, *(f"{layer}:{column}" for layer in result.layers for column in record.LAYER)]
        if result.rows:
            record.save(record.file_for(out, name, args.seed), meta, header, result.rows)
            last = result.rows[-1]
            print(
                f"{name}: {int(last[0]) + 1} iterations ({result.ended}), {result.seconds_per_step:.3f} s each, "
                f"loss {result.rows[0][1]:.3f} -> {last[1]:.3f}, stem gradient {last[9]:.2g}, scale {last[10]:.3g}, "
                f"skipped {last[11]:.0f}",
                flush=True,
            )


def _claimed(folder: str, name: str) -> bool:
    """Whether this process may train the arm; the first of those that share a folder of claims may."""
    if not folder:
        return True
    try:
        os.close(os.open(Path(folder) / name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
