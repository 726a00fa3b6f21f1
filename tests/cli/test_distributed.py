"""Two processes over gloo do what one does, and write what one writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.ddp_worker import one_step
from utils.checkpoint import read_checkpoint
from utils.dist import World
from utils.errors import explain_lost_peer
from utils.files import ROOT


def test_two_ranks_step_like_one_process_and_train(tmp_path: Path, tiny: Path) -> None:
    """Both ranks see the same two images, the single process sees them twice: the same batch, so the same step."""
    flags = f"--data {tiny} --cfg yolov5n.yaml --weights= --img 64 --batch 4 --epochs 1 --workers 0 --device cpu"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(ROOT / "tests" / "cli" / "ddp_worker.py"), f"{tmp_path}/rank", *flags.split()]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--project", f"{tmp_path}/runs"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    single = one_step(World(), copies=2)
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == pytest.approx(single, rel=1e-5)
    run = tmp_path / "runs" / "exp"
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["exp"]
    assert len((run / "results.csv").read_text().splitlines()) == 2
    assert done.stdout.count("Starting training for 1 epochs") == 1


def test_a_rank_that_is_killed_ends_the_others_with_one_line(tmp_path: Path, tiny: Path) -> None:
    """Without torchrun's agent, which would terminate them anyway. What the completed epochs left can be opened."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = f"--data {tiny} --cfg yolov5n.yaml --weights= --img 64 --batch 4 --epochs 500 --workers 0 --device cpu"
    command = [sys.executable, str(ROOT / "train.py"), *flags.split(), "--noval", "--noplots", "--project", "runs"]
    ranks = []
    for rank in range(2):
        where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port}
        env = {**os.environ, **where, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        with (tmp_path / f"{rank}.txt").open("w") as log:
            ranks.append(subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log))
    last = tmp_path / "runs" / "exp" / "weights" / "last.pt"
    try:
        deadline = time.monotonic() + 120
        while not last.is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        ranks[1].kill()
        assert ranks[0].wait(60) == 2
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    lines = (tmp_path / "0.txt").read_text().splitlines()
    assert lines[-1].startswith("rank 0: error: rank 1 has ended without a word (killed, or its machine is gone); ")
    assert lines[-1].endswith("go on with --resume") and not any("Traceback" in line for line in lines)
    assert read_checkpoint(last).train


def test_only_errors_of_the_connection_are_taken_for_a_lost_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("[/pytorch/gloo/pair.cc:561] Connection closed by peer [127.0.0.1]:1. This is typically caused")
    assert explain_lost_peer(lost) is None  # one process has no peers
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "(Connection closed by peer [127.0.0.1]:1)" in explain_lost_peer(lost)
    assert "(NCCL communicator was aborted on rank 1)" in explain_lost_peer(
        type("DistBackendError", (RuntimeError,), {})("NCCL communicator was aborted on rank 1. Original reason")
    )
    assert explain_lost_peer(ValueError("bad shape")) is None
