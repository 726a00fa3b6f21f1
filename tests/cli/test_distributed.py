"""Two processes over gloo do what one does, and write what one writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.ddp_worker import accumulated, one_step, validated
from utils.dist import World
from utils.errors import explain_lost_peer
from utils.files import ROOT


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of sets of real images with labels: an odd number of batches, and fewer images than ranks."""
    for name, count in (("five", 5), ("one", 1)):
        for kind in ("images", "labels"):
            (tmp_path / "sets" / name / kind).mkdir(parents=True)
        for image in sorted((ROOT / "data" / "bccd" / "images" / "val").iterdir())[:count]:
            shutil.copy(image, tmp_path / "sets" / name / "images")
            label = ROOT / "data" / "bccd" / "labels" / "val" / f"{image.stem}.txt"
            shutil.copy(label, tmp_path / "sets" / name / "labels")
    return tmp_path / "sets"


def test_two_ranks_do_what_one_process_does(tmp_path: Path, tiny: Path, pictures: Path) -> None:
    """Both ranks see the same two images, the single process sees them twice: the same batch, so the same step.
    Validation in shares finds what one process finds, to the last digit. Then they train."""
    flags = f"--data {tiny} --cfg yolov5n.yaml --weights= --img 64 --batch 4 --epochs 1 --workers 0 --device cpu"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(ROOT / "tests" / "cli" / "ddp_worker.py"), f"{tmp_path}/rank", str(pictures), *flags.split()]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--project", f"{tmp_path}/runs"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    single, both = one_step(World(), copies=2), accumulated(World(), copies=2)
    for rank in ranks:
        assert rank["step"] == pytest.approx(single, rel=1e-5)
        assert rank["shared step"] == pytest.approx(single, rel=1e-5)
        assert rank["accumulated"]["norms"] == pytest.approx(both["norms"], rel=1e-4)
        assert rank["accumulated"]["messages"] == [1, 1, 0, 1]  # the first batch teaches DDP its order
    for name in ("five", "one"):
        alone = validated(World(), pictures / name / "images", 2)
        assert ranks[0]["validated"][name] == alone and alone[3] > 0.1
        assert ranks[1]["validated"][name] == []
    run = tmp_path / "runs" / "exp"
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["exp"]
    assert len((run / "results.csv").read_text().splitlines()) == 2
    assert done.stdout.count("Starting training for 1 epochs") == 1
    assert done.stdout.count("Validating ") == 1


def test_only_errors_of_the_connection_are_taken_for_a_lost_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("[/pytorch/gloo/pair.cc:561] Connection closed by peer [127.0.0.1]:1. This is typically caused")
    assert explain_lost_peer(lost) is None  # one process has no peers
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "(Connection closed by peer [127.0.0.1]:1)" in explain_lost_peer(lost)
    assert "(NCCL communicator was aborted on rank 1)" in explain_lost_peer(
        type("DistBackendError", (RuntimeError,), {})("NCCL communicator was aborted on rank 1. Original reason")
    )
    assert explain_lost_peer(ValueError("bad shape")) is None
