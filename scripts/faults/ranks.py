"""Faults in one of the two ranks of a training: what either says, and how soon both have ended.

    python -m scripts.faults.ranks                  # two GPUs, NCCL; all rows at once
    python -m scripts.faults.ranks --device cpu     # gloo
    python -m scripts.faults.ranks --only 'stop'    # rows whose names match

The exit status is 1 when a promise was broken: every rank ends within a minute of the fault, those that are not killed
with a last line that names the rank and without a traceback, and what completed epochs left can be resumed.
"""

from __future__ import annotations

import argparse
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.launch import environment, launcher
from scripts.faults.inject import STRUCK
from scripts.faults.runs import Done, blood_cells
from utils.checkpoint import read_checkpoint
from utils.errors import UserError

TRAINING = "--cfg yolov5n.yaml --weights= --img 64 --batch 4 --noval --noplots --project runs"
LONGEST = 300.0
"""Seconds that a pair of ranks may take from its start."""
MINUTE = 60.0


@dataclass(frozen=True)
class Struck:
    """A pair of ranks of which the second had a fault. ``ranks``: what each printed, by rank; under torchrun one, with
    what all printed. ``seconds`` from the fault to the end of the last (a stopped one apart)."""

    ranks: tuple[Done, ...]
    seconds: float


def strike(folder: Path, fault: str, flags: Sequence[str], torchrun: Sequence[str] | None = None) -> Struck:
    """Train in two processes in ``folder``, the second with a fault of scripts.faults.inject.

    ``torchrun``: its flags, to start them with; otherwise they have no agent, which would end the other for them.
    TimeoutError when they do not end.
    """
    struck = folder / "struck"
    script = ["-m", "scripts.faults.inject", f"1@{fault}", "train.py", *flags]
    env = {**environment(), "PYTHONUNBUFFERED": "1", STRUCK: str(struck)}
    if torchrun is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        places = [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        command = [sys.executable, *script]
    else:
        places = [{}]
        command = [*launcher(2), *torchrun, *script]
    processes: list[subprocess.Popen] = []
    try:
        for place in places:
            with (folder / f"{len(processes)}.txt").open("wb") as log:
                processes.append(subprocess.Popen(command, cwd=folder, env={**env, **place}, stdout=log, stderr=log))
        processes[0].wait(LONGEST)
        if fault.startswith("stop"):
            processes[-1].kill()  # stopped, it cannot end by itself
        for process in processes:
            process.wait(MINUTE)
        seconds = time.time() - struck.stat().st_mtime if struck.exists() else float("nan")
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{fault}: the ranks do not end") from error
    finally:
        for process in processes:
            end(process)
    texts = [(folder / f"{number}.txt").read_text(errors="replace") for number in range(len(processes))]
    return Struck(tuple(Done(p.returncode, text) for p, text in zip(processes, texts, strict=True)), seconds)


def end(process: subprocess.Popen) -> None:
    """End it if it is still there; torchrun's agent has time to end its ranks, which would outlive it."""
    process.terminate()
    try:
        process.wait(40)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Row:
    """A fault, what rank 1 and rank 0 are to say about it (patterns; '' for nothing), and how they are started."""

    name: str
    fault: str
    rank1: str
    rank0: str
    flags: tuple[str, ...] = ()
    torchrun: tuple[str, ...] | None = None

    @property
    def agent(self) -> bool:
        """torchrun starts the ranks, and its output is all there is to read."""
        return self.torchrun is not None

    @property
    def restarts(self) -> bool:
        return bool(self.torchrun)


GONE = "rank 1 has ended without a word"
SILENT = "rank 1 has given no sign of life"
MEMORY = r"(GPU|CPU) memory ran out at batch 4, 64 px"
LOADER = "a data loading process died"
STILL = r"rank 1 \(waits for its loader\) has stood still|no rank has moved"
HANGS = r"rank 1 \(is in a step\) has stood still|no rank has moved for"
FEW = ("--epochs", "4")

ROWS = (
    Row("killed", "kill:9", "", GONE),
    Row("killed, under torchrun", "kill:9", "", "Signal 9", torchrun=()),
    Row("killed, under torchrun --max-restarts 3", "kill:9", "", "Resuming", FEW, ("--max-restarts", "3")),
    Row("memory ran out", "gpu-memory", MEMORY, f"rank 1 has ended .{MEMORY}"),
    Row("a loader process died", "kill-a-worker:9", LOADER, f"rank 1 has ended .{LOADER}", ("--workers", "1")),
    Row("stopped", "stop:9", "", SILENT),
    Row("its images do not come", "stall:9", STILL, STILL),
    Row("its GPU hangs", "hang-gpu:9", HANGS, HANGS),
)


def broken_promises(row: Row, struck: Struck, run: Path) -> list[str]:
    """What did not hold; empty when all did. ``run``: the run's folder."""
    first, last = struck.ranks[0], struck.ranks[-1]
    if row.restarts:
        results = run / "results.csv"
        epochs = len(results.read_text().splitlines()) - 1 if results.exists() else 0
        promises = [(first.status == 0 and epochs == int(FEW[1]), f"exit status {first.status}, {epochs} epochs")]
    else:
        killed = not row.rank1 and not row.agent
        promises = [
            (first.status != 0, "exit status 0"),
            (struck.seconds < MINUTE, f"{struck.seconds:.0f} s"),
            (row.fault == "gpu-memory" or can_be_resumed(run), "last.pt cannot be resumed"),  # that comes in epoch 1
            (not killed or last.status == -signal.SIGKILL, f"rank 1: {last.status}"),
        ]
    for rank, done, pattern in ((0, first, row.rank0), (1, last, row.rank1)):
        if pattern:
            told = re.search(pattern, done.text if row.agent else done.line("error:"))
            promises.append((bool(told), f"rank {rank} does not say {pattern!r} but {done.line()!r}"))
            orderly = row.agent or (done.status == 2 and done.clean)
            promises.append((orderly, f"rank {rank} ended with {done.status} or a traceback"))
    return [words for held, words in promises if not held]


def can_be_resumed(run: Path) -> bool:
    try:
        return bool(read_checkpoint(run / "weights" / "last.pt").train)
    except UserError:
        return False


def outcome(row: Row, folder: Path, extra: Sequence[str], data: Path) -> tuple[str, bool]:
    """The row of the table, and whether all promises held."""
    folder.mkdir()
    workers = () if "--workers" in row.flags else ("--workers", "0")
    epochs = () if "--epochs" in row.flags else ("--epochs", "500")
    flags = ["--data", str(data), *TRAINING.split(), *workers, *epochs, *row.flags, *extra]
    try:
        struck = strike(folder, row.fault, flags, row.torchrun)
    except TimeoutError as error:
        return f"| {row.name} | | | | {error} |", False
    broken = broken_promises(row, struck, folder / "runs" / "exp")
    words = (struck.ranks[-1].line("error:") if row.rank1 else "",
             struck.ranks[0].line(row.rank0 if row.agent else "error:"))  # fmt: skip
    said = [f"`{line[:150]}`" if line else "nothing" for line in words]
    cells = (row.name, *said, f"{struck.seconds:.1f}", "; ".join(broken) or "held")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |", not broken


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.faults.ranks", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="", choices=["", "cpu"], help="cpu: gloo (default: two GPUs)")
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose names match")
    parser.add_argument("--at-once", type=int, default=0, metavar="N", help="rows that run at the same time (all)")
    parser.add_argument("--cuda-graphs", default="on", choices=["off", "on"], help="on a GPU")
    args = parser.parse_args(argv)
    if args.device != "cpu" and torch.cuda.device_count() < 2:
        parser.error("two GPUs are needed; --device cpu runs the ranks over gloo")
    here = [row for row in ROWS if args.device != "cpu" or not row.fault.startswith("hang-gpu")]
    rows = [row for row in here if re.search(args.only, row.name)]
    if not rows:
        parser.error(f"--only {args.only}: matches none of {', '.join(row.name for row in here)}")
    extra = ["--device", "cpu"] if args.device == "cpu" else ["--cuda-graphs", args.cuda_graphs]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = blood_cells(folder)
        with ThreadPoolExecutor(args.at_once or len(rows)) as pool:
            done = list(pool.map(lambda n: outcome(rows[n], folder / str(n), extra, data), range(len(rows))))
    where = "CPU, gloo" if args.device == "cpu" else f"{torch.cuda.get_device_name()} x 2, graphs {args.cuda_graphs}"
    print(f"{where}, torch {torch.__version__}\n")
    print("| fault in rank 1 | rank 1 says | rank 0 says | all ended after, s | promises |\n|---|---|---|---|---|")
    print("\n".join(line for line, _ in done))
    return int(not all(held for _, held in done))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
