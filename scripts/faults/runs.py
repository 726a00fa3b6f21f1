"""Small trainings on real images as processes, for the faults: start, strike, resume, compare."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.checkpoint import read_checkpoint
from utils.files import ROOT

EPOCHS = 3
SECONDS = 400
"""The longest that one process may take."""


@dataclass(frozen=True)
class Done:
    """A process that ended. ``text``: its stdout and stderr."""

    status: int
    text: str

    def line(self, word: str = "") -> str:
        """The last line that holds ``word``, shortened to what it says."""
        lines = [line.strip() for line in self.text.splitlines() if word in line and line.strip()]
        return lines[-1] if lines else ""

    @property
    def clean(self) -> bool:
        """No traceback was shown."""
        return "Traceback (most recent call last)" not in self.text


def blood_cells(folder: Path, train: int = 16, val: int = 8) -> Path:
    """data.yaml of a copy of the first images of data/bccd in ``folder``."""
    for split, count in (("train", train), ("val", val)):
        for image in sorted((ROOT / "data" / "bccd" / "images" / split).iterdir())[:count]:
            for kind, name in (("images", image.name), ("labels", f"{image.stem}.txt")):
                (folder / "bccd" / kind / split).mkdir(parents=True, exist_ok=True)
                source = ROOT / "data" / "bccd" / kind / split / name
                if source.is_file():
                    shutil.copy(source, folder / "bccd" / kind / split / name)
    path = folder / "bccd" / "data.yaml"
    path.write_text("path: .\ntrain: images/train\nval: images/val\nnames: [RBC, WBC, Platelets]\n")
    return path


def training(folder: Path, *more: str, name: str = "exp", epochs: int = EPOCHS, size: int = 96) -> list[str]:
    """The flags of the smallest training that is one: yolov5n, 4 steps an epoch."""
    data = folder / "bccd" / "data.yaml"
    flags = ["--data", str(data if data.is_file() else blood_cells(folder)), "--cfg", "yolov5n.yaml", "--weights", ""]
    flags += ["--img", str(size), "--batch", "4", "--epochs", str(epochs), "--workers", "0", "--device", "cpu"]
    return [*flags, "--noplots", "--project", str(folder / "runs"), "--name", name, *more]


def command(script: str, flags: list[str], fault: str = "") -> list[str]:
    """The command line of a script of this repository, with a fault of scripts.faults.inject built in."""
    return (
        [sys.executable, "-m", "scripts.faults.inject", fault, script, *flags]
        if fault
        else [sys.executable, script, *flags]
    )


def run(
    argv: list[str],
    folder: Path,
    strike: Callable[[subprocess.Popen], None] | None = None,
    after: str | float = "",
    before_exec: Callable[[], None] | None = None,
) -> Done:
    """Run to the end, ``strike`` once ``after`` was printed (or so many seconds have passed)."""

    def prepare() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):  # nohup and a shell's & turn them off, also for what we start
            signal.signal(number, signal.SIG_DFL)
        if before_exec:
            before_exec()

    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    env |= {"XDG_CACHE_HOME": str(folder / "cache")}
    output = folder / "output.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=prepare,
        )
        start = time.monotonic()
        waiting = strike is not None
        while process.poll() is None:
            passed = time.monotonic() - start
            due = after in output.read_text(errors="replace") if isinstance(after, str) else passed >= after
            if waiting and due:
                waiting = False
                strike(process)
            if passed > SECONDS:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.01)
    return Done(process.returncode, output.read_text(errors="replace"))


def resume(folder: Path, *more: str, name: str = "exp") -> Done:
    """``train.py --resume`` of a run."""
    return run(command("train.py", ["--resume", str(folder / "runs" / name), *more]), folder)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Averaged and trained weights of a run's last.pt."""
    saved = read_checkpoint(run_dir / "weights" / "last.pt")
    return {**saved.model, **{f"train.{key}": value for key, value in saved.train["model"].items()}}


def same(run_dir: Path, other: Path) -> bool:
    """Whether two runs have bit for bit the same weights, and the same results.csv."""
    ours, theirs = weights(run_dir), weights(other)
    equal = ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())
    return equal and (run_dir / "results.csv").read_text() == (other / "results.csv").read_text()


def leftovers(folder: Path) -> list[str]:
    """Temporary files below a run's folder."""
    return [path.name for path in folder.rglob("*.tmp")]
