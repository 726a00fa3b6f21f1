"""Every attack of scripts/faults, in this process: one clear line, nothing run, nothing written outside."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.faults import checkpoints
from scripts.faults.attack import judge, snapshot, written
from scripts.faults.hostile import HOSTILE, Hostile
from utils.errors import run_cli

CASES = [*HOSTILE, *checkpoints.HOSTILE]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, gone afterwards: pytest's own cleaning fails on folders a thousand deep."""
    yield tmp_path
    subprocess.run(["rm", "-rf", str(tmp_path)], check=True)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_attack(case: Hostile, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    script, *flags = case.build(folder)
    before = snapshot(folder)
    status = run_cli(importlib.import_module(script.removesuffix(".py")).main, flags)
    out, err = capsys.readouterr()
    assert judge(case, status, out + err) + written(folder, before) == []
