"""Every attack of scripts/faults/hostile.py, in this process: one clear line, nothing run, nothing written outside."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from scripts.faults.attack import judge, snapshot, written
from scripts.faults.hostile import HOSTILE, Hostile
from utils.errors import run_cli


@pytest.mark.parametrize("case", HOSTILE, ids=[case.name for case in HOSTILE])
def test_attack(case: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    script, *flags = case.build(tmp_path)
    before = snapshot(tmp_path)
    status = run_cli(importlib.import_module(script.removesuffix(".py")).main, flags)
    out, err = capsys.readouterr()
    assert judge(case, status, out + err) + written(tmp_path, before) == []
