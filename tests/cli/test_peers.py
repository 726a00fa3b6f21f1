"""What becomes of the other ranks when one runs out of memory, loses its loader, stops or stands still."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.faults.ranks import TRAINING, Struck, strike
from utils.checkpoint import read_checkpoint


@pytest.fixture
def two_ranks(tmp_path: Path, tiny: Path) -> Callable[..., Struck]:
    """Train in two processes, the second with a fault, without torchrun's agent, which would end the other for them."""

    def call(fault: str, *flags: str) -> Struck:
        common = ["--data", str(tiny), *TRAINING.split(), "--epochs", "500", "--device", "cpu"]
        return strike(tmp_path, fault, [*common, *flags])

    return call


def last_line(text: str) -> str:
    assert "Traceback" not in text, text[-3000:]
    return text.splitlines()[-1]


def test_a_rank_that_is_killed_is_named(two_ranks, tmp_path: Path) -> None:
    """What the completed epochs left can be opened."""
    struck = two_ranks("kill:9", "--workers", "0")
    assert struck.ranks[0].status == 2 and struck.seconds < 30
    line = last_line(struck.ranks[0].text)
    assert line.startswith("rank 0: error: rank 1 has ended without a word (killed, or its machine is gone); ")
    assert line.endswith("go on with --resume")
    assert read_checkpoint(tmp_path / "runs" / "exp" / "weights" / "last.pt").train


def test_out_of_memory_in_one_rank_is_told_by_both(two_ranks) -> None:
    first, second = two_ranks("gpu-memory", "--workers", "0").ranks
    assert (first.status, second.status) == (2, 2)
    assert last_line(second.text).startswith("rank 1: error: CPU memory ran out at batch 4, 64 px; use --batch-size 2")
    line = last_line(first.text)
    assert line.startswith("rank 0: error: rank 1 has ended (CPU memory ran out at batch 4, 64 px; use ")
    assert line.endswith("go on with --resume")


@pytest.mark.processes
def test_a_loader_that_dies_in_one_rank_is_told_by_both(two_ranks) -> None:
    first, second = two_ranks("kill-a-worker:3", "--workers", "1").ranks
    assert (first.status, second.status) == (2, 2)
    assert "rank 1: error: a data loading process died" in last_line(second.text)
    assert "rank 0: error: rank 1 has ended (a data loading process died" in last_line(first.text)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("fault", "line"),
    [
        pytest.param("stop", "has given no sign of life for", id="stopped"),
        pytest.param("stall", "(waits for its loader) has stood still for", id="stands still"),
    ],
)
def test_a_rank_that_hangs_is_given_up(two_ranks, tmp_path: Path, fault: str, line: str) -> None:
    struck = two_ranks(f"{fault}:9", "--workers", "0", "--ddp-timeout", "4")
    first, second = struck.ranks
    assert first.status == 2 and struck.seconds < 60
    # rank 1 may have come to the same conclusion a moment before and said so
    assert last_line(first.text).startswith("rank 0: error: rank 1 ") and line in last_line(first.text)
    assert fault == "stop" or last_line(second.text).startswith("rank 1: error: rank 1 (waits for its loader) has")
    assert read_checkpoint(tmp_path / "runs" / "exp" / "weights" / "last.pt").train
