"""Two processes over gloo do what one does, and write what one writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.ddp_worker import one_step
from utils.dist import World
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
