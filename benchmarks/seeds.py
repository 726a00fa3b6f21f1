"""Accuracy of several models over several seeds: trains all, side by side, then validates each best.pt.

    python -m benchmarks.seeds --data bccd.yaml --cfg yolov5s.yaml yolov5s-dcn.yaml --seeds 3 --epochs 100 --jobs 6

Runs are folders PROJECT/CFG-seedK; one that has a last.pt is resumed, one that is finished is only validated, so the
command may be repeated after an interruption. Extra flags for train.py go after ``--``.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.report import cpu_name, heading, table
from utils.device import describe_device, select_device

ROOT = Path(__file__).resolve().parents[1]


def train_one(args: argparse.Namespace, cfg: str, seed: int) -> tuple[str, int, float]:
    """Train (or go on with) one run; its console output goes to PROJECT/NAME.log. Returns the seconds it took."""
    name = f"{Path(cfg).stem}-seed{seed}"
    run = Path(args.project) / name
    shared = ["--workers", str(args.workers), "--device", args.device, "--cache", "ram"]
    if (run / "weights" / "last.pt").is_file():
        flags = ["--resume", str(run), "--workers", str(args.workers)]
    else:
        flags = ["--data", args.data, "--cfg", cfg, "--weights", "", "--seed", str(seed), "--epochs", str(args.epochs)]
        flags += ["--batch-size", str(args.batch_size), "--imgsz", str(args.imgsz), *shared]
        flags += ["--project", args.project, "--name", name, "--exist-ok", *args.extra]
    start = time.perf_counter()
    with (Path(args.project) / f"{name}.log").open("a", encoding="utf-8") as log:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, stdout=log, stderr=log, env=env, check=False)
    return cfg, seed, time.perf_counter() - start


def scores(args: argparse.Namespace, weights: Path, task: str) -> tuple[float, float]:
    """mAP50 and mAP50-95 of val.py's 'all' row, in float32."""
    flags = ["--weights", str(weights), "--data", args.data, "--task", task, "--imgsz", str(args.imgsz)]
    flags += ["--project", f"{args.project}/val", "--workers", "4", "--device", args.device]
    done = subprocess.run([sys.executable, "val.py", *flags], cwd=ROOT, capture_output=True, text=True, check=False)
    row = re.search(r"^\s+all\s+\d+\s+\d+\s+(\S+)\s+(\S+)\s+(\S+)\s+(\S+)\s*$", done.stdout, re.M)
    if done.returncode or not row:
        raise SystemExit(f"val.py {weights}: {done.stderr or done.stdout}")
    return float(row.group(3)), float(row.group(4))


def main() -> None:
    argv, extra = sys.argv[1:], []
    if "--" in argv:
        argv, extra = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--cfg", nargs="+", default=["yolov5s.yaml", "yolov5s-dcn.yaml"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--project", default="runs/seeds")
    parser.add_argument("--device", default="")
    args = parser.parse_args(argv)
    args.extra = extra
    Path(args.project).mkdir(parents=True, exist_ok=True)
    todo = [(cfg, seed) for seed in range(args.seeds) for cfg in args.cfg]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = list(pool.map(lambda job: train_one(args, *job), todo))
    rows, by_cfg = [], {}
    for cfg, seed, seconds in done:
        best = Path(args.project) / f"{Path(cfg).stem}-seed{seed}" / "weights" / "best.pt"
        values = [*scores(args, best, "val"), *scores(args, best, "test")]
        by_cfg.setdefault(cfg, []).append(values)
        rows.append([Path(cfg).stem, seed, *values, seconds])
    for cfg, values in by_cfg.items():
        columns = list(zip(*values))
        spread = [f"{statistics.mean(c):.3f} +- {statistics.stdev(c):.3f}" if len(c) > 1 else c[0] for c in columns]
        rows.append([f"**{Path(cfg).stem}**", "mean", *spread, "-"])
    print(heading(f"{describe_device(select_device(args.device))}; {cpu_name()}; {args.jobs} trainings at a time"))
    header = ["model", "seed", "val mAP50", "val mAP50-95", "test mAP50", "test mAP50-95", "seconds (shared GPU)"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
