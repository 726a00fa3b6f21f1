"""Where a short training's time goes, from the shell to its end: start, learning, validation, saving, pictures.

    python -m benchmarks.epochs --data bccd.yaml --cfg yolov5s.yaml --epochs 7 --workers 8 --repeats 3
    python -m benchmarks.epochs --data bccd.yaml --cfg yolov5n.yaml --imgsz 64 --device cpu    # what is not learning

Each repeat is a whole ``train.py`` in a process of its own, with its parts timed from inside; "exit" is what comes
after the last line. The limit is the bare steps of "learning" without its first epoch. Upstream: 24.8 s on an H100
(start to end, 7 epochs of yolov5s on BCCD, batch 16, 8 workers). Its loop took 21.6 s of them, which leaves 3.2 for
what comes before the first batch and nothing for the imports, about 15 s on that machine: it compares with what is
between imports and exit here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import cpu_name, heading, table
from utils.errors import end_process, run_cli
from utils.gc_pause import lasting_imports

ROOT = Path(__file__).resolve().parents[1]
UPSTREAM = {"yolov5s.yaml": 24.8}
# functions of engine/trainer.py by the part that they are
PARTS = {
    "select_device": "model, device",
    "build_model": "model, device",
    "build_datasets": "data",
    "build_loaders": "data",
    "fit_anchors": "data",
    "summarize": "model, device",
    "build_learner": "optimizer",
    "_first_pictures": "first pictures",
    "train_one_epoch": "learning",
    "validate": "validation",
    "save_epoch": "saving",
    "_log_epoch": "logging",
    "_final_validation": "last validation",
}
ORDER = ("python, imports", *dict.fromkeys(PARTS.values()), "other", "exit")
PROCESS = ("python, imports", "exit")


class Stopwatch:
    """Seconds by part; a function inside another's counts as that of the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.epochs: list[float] = []
        self._busy = False

    def timed(self, part: str, function: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._busy:
                return function(*args, **kwargs)
            self._busy, start = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took, self._busy = time.perf_counter() - start, False
                self.seconds[part] = self.seconds.get(part, 0.0) + took
                if part == "learning":
                    self.epochs.append(took)

        return wrapper


def child(report: str, begun: float, flags: list[str]) -> None:
    """train.py with a stopwatch; ``begun``: when the parent started this process."""
    watch = Stopwatch()
    import train

    def main(argv: list[str]) -> int:
        with lasting_imports():  # as train.py does
            from engine import trainer

        watch.seconds["python, imports"] = time.time() - begun
        for name, part in PARTS.items():
            setattr(trainer, name, watch.timed(part, getattr(trainer, name)))
        return train.main(argv)

    if status := run_cli(main, flags):
        end_process(status)
    result = {"seconds": watch.seconds, "epochs": watch.epochs, "ended": time.time()}
    Path(report).write_text(json.dumps(result), encoding="utf-8")
    end_process(0)  # as train.py ends


def run_once(flags: list[str]) -> tuple[dict[str, float], list[float], float]:
    """One training: seconds by part, those of each epoch's learning, and all."""
    with tempfile.TemporaryDirectory() as folder:
        report, begun = Path(folder) / "report.json", time.time()
        inside = [str(report), str(begun), *flags, "--project", folder]
        command = [sys.executable, "-m", "benchmarks.epochs", "--inside", *inside]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        ended = time.time()
        if done.returncode:
            raise SystemExit(done.stderr[-2000:].rstrip())
        result = json.loads(report.read_text(encoding="utf-8"))
    seconds = {**result["seconds"], "exit": ended - result["ended"]}
    seconds["other"] = ended - begun - sum(seconds.values())
    told = ", ".join(f"{part} {took:.2f}" for part, took in seconds.items())
    print(f"{ended - begun:.2f} s: {told}", file=sys.stderr, flush=True)  # a time limit then leaves something
    return seconds, result["epochs"], ended - begun


def main() -> None:
    if "--inside" in sys.argv[1:2]:
        return child(sys.argv[2], float(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--cfg", default="yolov5s.yaml")
    parser.add_argument("--imgsz", default="640")
    parser.add_argument("--batch-size", default="16")
    parser.add_argument("--epochs", default="7")
    parser.add_argument("--workers", default="8")
    parser.add_argument("--device", default="")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more of train.py's flags, last")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: at least 1")
    names = ("data", "cfg", "imgsz", "batch-size", "epochs", "workers", "device")
    flags = [f"--{name}={getattr(args, name.replace('-', '_'))}" for name in names] + args.flags
    runs = [run_once(flags) for _ in range(args.repeats + 1)][1:]  # the first fills caches: labels, byte code, kernels
    rows = []
    for part in ORDER:
        values = [seconds.get(part, 0.0) for seconds, _, _ in runs]
        rows.append([part, statistics.median(values), min(values), max(values)])
    totals = [total for *_, total in runs]
    inside = [total - sum(seconds[part] for part in PROCESS) for seconds, _, total in runs]
    for name, values in (("**all**", totals), ("**all but imports and exit**", inside)):
        rows.append([name, statistics.median(values), min(values), max(values)])
    print(heading(f"{cpu_name()}; load {os.getloadavg()[0]:.1f}"))
    print(table(["part, s", "median", "least", "most"], rows))
    later = statistics.median(statistics.median(epochs[1:] or epochs) for _, epochs, _ in runs)
    print(
        f"\nlearning, epoch after epoch (last run): {', '.join(f'{s:.2f}' for s in runs[-1][1])} s; usual {later:.2f} s"
    )
    if args.cfg in UPSTREAM:
        print(
            f"upstream on an H100, imports and exit left out: {UPSTREAM[args.cfg]} s, "
            f"ratio {UPSTREAM[args.cfg] / statistics.median(inside):.2f}"
        )


if __name__ == "__main__":
    main()
