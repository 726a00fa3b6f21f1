"""Seconds from the shell to an answer: --help, a wrong flag, a wrong file, for each script.

    python -m benchmarks.startup

The alternative is upstream's figure for --help on the same kind of machine (taken 2026-11-24, 2-core EPYC); the
limit is an empty Python process, measured here.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.report import cpu_name, heading, table

ROOT = Path(__file__).resolve().parents[1]
UPSTREAM_HELP = {"train.py": 4.57, "val.py": 4.53, "detect.py": 3.74}


def seconds(command: list[str], repeats: int) -> float:
    """Median wall time of a command, warm disk."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    empty = seconds([sys.executable, "-c", "pass"], repeats)
    rows = []
    for script, upstream in UPSTREAM_HELP.items():
        answers = [seconds([sys.executable, script, *flags], repeats) for flags in (["--help"], ["--nonsense"])]
        rows.append([script, *answers, upstream, empty, upstream / answers[0]])
    print(heading(cpu_name()))
    print(table(["script", "--help, s", "wrong flag, s", "upstream --help, s", "empty Python, s", "ratio"], rows))


if __name__ == "__main__":
    main()
