"""Two torchrun agents on one machine, as on two: they find each other, train, and go on when one is replaced."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from utils.files import ROOT

pytestmark = pytest.mark.processes

TRAINING = "--cfg yolov5n.yaml --weights= --img 64 --batch 4 --workers 0 --device cpu --noplots"


@pytest.fixture
def agent(tmp_path: Path, tiny: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start an agent of the same job, for one process; what it says goes to NAME.txt. All end with the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job9"]
    command += ["--rdzv-conf", "join_timeout=60,keep_alive_interval=1,keep_alive_max_attempt=2"]
    command += ["--local-addr", "127.0.0.1", "--max-restarts", "3", str(ROOT / "train.py"), "--data", str(tiny)]
    started = []

    def start(name: str, *flags: str) -> subprocess.Popen:
        # else the agent that stays keeps what it once told of the store, and one that is new waits for it in vain
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with (tmp_path / f"{name}.txt").open("w") as log:
            flags = [*TRAINING.split(), "--project", str(tmp_path / "runs"), *flags]
            started.append(subprocess.Popen([*command, *flags], cwd=tmp_path, env=env, stdout=log, stderr=log))
        if len(started) == 1:  # it keeps the store, with which a lost machine cannot be replaced
            wait_for_listener(port)
        return started[-1]

    yield start
    for process in started:
        machine_lost(process)


def wait_for_listener(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nobody listens at port {port}")


def machine_lost(agent: subprocess.Popen) -> None:
    """The agent and its process are gone at once."""
    if agent.poll() is None:
        family = psutil.Process(agent.pid).children(recursive=True)
        for process in [agent, *family]:
            process.kill()
    agent.wait()


def epochs(results: Path) -> list[int]:
    rows = results.read_text().splitlines()[1:] if results.is_file() else []
    return [int(row.split(",")[0]) for row in rows]


def test_two_agents_train_together(agent, tmp_path: Path) -> None:
    both = [agent(name, "--epochs", "2") for name in ("first", "second")]
    assert [process.wait(90) for process in both] == [0, 0]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["exp"]
    assert epochs(tmp_path / "runs" / "exp" / "results.csv") == [0, 1]
    said = [(tmp_path / f"{name}.txt").read_text() for name in ("first", "second")]
    assert sum(text.count("Starting training for 2 epochs") for text in said) == 1  # rank 0 alone speaks


def test_a_lost_machine_is_replaced_and_the_run_goes_on(agent, tmp_path: Path) -> None:
    results = tmp_path / "runs" / "exp" / "results.csv"
    first, second = (agent(name, "--epochs", "12") for name in ("first", "second"))
    deadline = time.monotonic() + 90
    while len(epochs(results)) < 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    machine_lost(second)
    third = agent("third", "--epochs", "12")
    assert [process.wait(150) for process in (first, third)] == [0, 0], (tmp_path / "first.txt").read_text()[-3000:]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["exp"] and epochs(results) == list(range(12))
    said = "".join((tmp_path / f"{name}.txt").read_text() for name in ("first", "third"))
    assert "Resuming " in said
