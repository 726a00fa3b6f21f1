"""What becomes of the other ranks when one runs out of memory, loses its loader, stops or stands still."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from utils.checkpoint import read_checkpoint
from utils.files import ROOT

TRAINING = "--cfg yolov5n.yaml --weights= --img 64 --batch 4 --epochs 500 --device cpu --noval --noplots --project runs"


@pytest.fixture
def two_ranks(tmp_path: Path, tiny: Path) -> Callable[..., list[tuple[int, str]]]:
    """Train in two processes, the second with a fault, without torchrun's agent, which would end the other for them.
    For each rank: exit status, and what it printed."""

    def call(fault: str, *flags: str) -> list[tuple[int, str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        command = [sys.executable, "-m", "scripts.faults.inject", f"1@{fault}", "train.py", "--data", str(tiny)]
        command += [*TRAINING.split(), *flags]
        ranks = []
        for rank in range(2):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            env = {**os.environ, **where, **own}
            with (tmp_path / f"{rank}.txt").open("w") as log:
                ranks.append(subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log))
        try:
            first = ranks[0].wait(90)
            if fault.startswith("stop"):
                ranks[1].kill()
            statuses = first, ranks[1].wait(60)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return [(status, (tmp_path / f"{rank}.txt").read_text()) for rank, status in enumerate(statuses)]

    return call


def last_line(text: str) -> str:
    assert "Traceback" not in text, text[-3000:]
    return text.splitlines()[-1]


def test_out_of_memory_in_one_rank_is_told_by_both(two_ranks) -> None:
    (status, text), (status1, text1) = two_ranks("gpu-memory", "--workers", "0")
    assert (status, status1) == (2, 2)
    assert last_line(text1).startswith("rank 1: error: CPU memory ran out at batch 4, 64 px; use --batch-size 2")
    assert last_line(text).startswith("rank 0: error: rank 1 has ended (CPU memory ran out at batch 4, 64 px; use ")
    assert last_line(text).endswith("go on with --resume")


@pytest.mark.processes
def test_a_loader_that_dies_in_one_rank_is_told_by_both(two_ranks) -> None:
    (status, text), (status1, text1) = two_ranks("kill-a-worker:3", "--workers", "1")
    assert (status, status1) == (2, 2)
    assert "rank 1: error: a data loading process died" in last_line(text1)
    assert "rank 0: error: rank 1 has ended (a data loading process died" in last_line(text)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("fault", "line"),
    [
        pytest.param("stop", "has given no sign of life for", id="stopped"),
        pytest.param("stall", "(waits for its loader) has stood still for", id="stands still"),
    ],
)
def test_a_rank_that_hangs_is_given_up(two_ranks, tmp_path: Path, fault: str, line: str) -> None:
    start = time.monotonic()
    (status, text), (_, text1) = two_ranks(f"{fault}:9", "--workers", "0", "--ddp-timeout", "4")
    assert status == 2 and time.monotonic() - start < 60
    # rank 1 may have come to the same conclusion a moment before and said so
    assert last_line(text).startswith("rank 0: error: rank 1 ") and line in last_line(text)
    assert fault == "stop" or last_line(text1).startswith("rank 1: error: rank 1 (waits for its loader) has")
    assert read_checkpoint(tmp_path / "runs" / "exp" / "weights" / "last.pt").train
