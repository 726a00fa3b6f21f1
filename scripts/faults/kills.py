"""Random kill -9: trainings that are killed again and again, and end at the numbers of one that was not."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.faults.runs import Done, command, run, same, training

PER_TRAINING = 10
EPOCHS = 8


@dataclass
class KillReport:
    """What happened: ``moments`` counts where the kills struck; ``faults`` what should not have happened."""

    kills: int = 0
    trainings: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def broken(self) -> tuple[str, ...]:
        return tuple(self.faults)

    def row(self) -> str:
        """The row of a Markdown table."""
        moments = ", ".join(f"{number} {moment}" for moment, number in sorted(self.moments.items()))
        end = "; ".join(self.faults) or "weights (bit for bit) and results.csv of a training left alone"
        return f"| {self.kills} | {moments} | {self.trainings} | {end} | {self.seconds:.0f} |"


HEADER = "| random kill -9 | when | trainings, resumed after each | ended at | s |\n|---|---|---|---|---|"


def rows(only: str = "", count: int = 50) -> Iterator[KillReport]:
    """``count`` kills, unless ``only`` asks for rows of other names."""
    if not count or not re.search(only, "random kill -9"):
        return
    folder, start = Path(tempfile.mkdtemp(prefix="kills-")), time.monotonic()
    try:
        report = random_kills(folder, count)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report.seconds = time.monotonic() - start
    yield report


def random_kills(folder: Path, count: int, seed: int = 0) -> KillReport:
    """Kill trainings ``count`` times in all, at random moments, resuming each time; then compare their ends."""
    rng, report = random.Random(seed), KillReport()
    whole = run(command("train.py", training(folder, name="whole", epochs=EPOCHS)), folder)
    seconds = _seconds(folder, whole)
    while report.kills < count:
        report.trainings += 1
        name = f"killed{report.trainings}"
        _one(folder, name, min(PER_TRAINING, count - report.kills), seconds, rng, report)
        if not same(folder / "runs" / name, folder / "runs" / "whole"):
            report.faults.append(f"{name} ended at other numbers")
    return report


def _seconds(folder: Path, whole: Done) -> float:
    """How long one start and EPOCHS epochs take: the span of the random moments."""
    if whole.status:
        raise RuntimeError(whole.text[-2000:])
    start = time.monotonic()
    run(command("train.py", training(folder, name="timed", epochs=EPOCHS)), folder)
    return time.monotonic() - start


def _one(folder: Path, name: str, kills: int, seconds: float, rng: random.Random, report: KillReport) -> None:
    for _ in range(kills):
        # every other time from the first epoch on: half of a small training is its start
        after, delay = rng.choice(
            [(0.0, rng.uniform(0.2, seconds)), ("Starting training", rng.uniform(0, seconds / 2))]
        )
        done = _go_on(folder, name, _kill_after(delay), after)
        if done.status == -signal.SIGKILL:
            report.kills += 1
            report.moments[_moment(done.text)] += 1
        else:
            break
    else:
        done = _go_on(folder, name)
    if done.status != 0 and "are finished" not in done.text:
        report.faults.append(f"{name}: ended with {done.status}, {done.line()}")


def _kill_after(seconds: float) -> Callable[[subprocess.Popen], None]:
    def strike(process: subprocess.Popen) -> None:
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)

    return strike


def _go_on(folder: Path, name: str, *strike: Any) -> Done:
    """What its user would do: the command itself while there is no run to resume, then --resume."""
    started = all((folder / "runs" / name / file).is_file() for file in ("opt.yaml", "hyp.yaml"))
    fresh = training(folder, "--exist-ok", name=name, epochs=EPOCHS)
    return run(command("train.py", ["--resume", str(folder / "runs" / name)] if started else fresh), folder, *strike)


def _moment(text: str) -> str:
    """Where a training was when it was killed, from what it had printed."""
    if "Starting training" not in text:
        return "starting"
    tail = text.rstrip().splitlines()[-1]
    if "Results saved" in text or "epochs completed" in text:
        return "final validation"
    return "validating" if "mAP50" in tail else "between epochs" if " all " in tail else "training"
