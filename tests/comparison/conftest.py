"""A train.py that takes no time, and a result to report on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from comparison.costs import Cost
from comparison.findings import analyse
from comparison.plan import Plan
from comparison.report import Comparison, Example
from comparison.verdict import Verdict
from tests.comparison.test_resampling import made_up

FAKE_TRAIN = """
import pathlib, signal, sys, time
def value(flag): return sys.argv[sys.argv.index(flag) + 1]
resumed = "--resume" in sys.argv
run = pathlib.Path(value("--resume")) if resumed else pathlib.Path(value("--project")) / value("--name")
(run / "weights").mkdir(parents=True, exist_ok=True)
options = run / "opt.yaml"
if not options.exists():
    options.write_text("epochs: 1\\n")
print("begins", "again" if resumed else "anew", flush=True)
if "broken" in run.name:
    sys.exit("error: broken.yaml:3: the rod is out of skew \\033[2J\\n\\n")
if "slow" in run.name and not resumed:
    signal.signal(signal.SIGTERM, lambda *a: sys.exit("terminated: saved"))
    time.sleep(60)
(run / "weights" / "best.pt").write_bytes(b"")
options.write_text("epochs: 1\\nfinished: true\\n")
"""


@pytest.fixture
def fake_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for train.py: finishes at once; `broken` models fail, `slow` ones take a minute unless resumed."""
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr("comparison.trainings.ROOT", folder)
    monkeypatch.setattr("comparison.trainings.POLL", 0.02)
    return folder


@pytest.fixture(scope="session")
def result() -> Comparison:
    """Two models, two seeds, a val and a test split; names that would do harm if they were not escaped."""
    names = {0: "<script>alert(1)</script>", 1: "=cmd|'/c calc'!A0", 2: "never"}
    first, second = "a&b", "<b>bold</b>"
    runs = {first: [made_up(seed=0), made_up(seed=0)], second: [made_up(seed=0), made_up(seed=0)]}
    splits = tuple(analyse(split, runs, names, resamples=100) for split in ("val", "test"))
    cost = Cost(1_000_000, 4.2, (60.0, 62.0), 20.0, None)
    dearer = Cost(1_100_000, 4.4, (120.0, 124.0), 30.0, 1.25)
    picture = Example('"><img src=x onerror=alert(2)>', (("labels", b"\xff\xd8"), (f"{second} (F1 1.00)", b"\xff\xd9")))
    curves = {model: np.linspace(0, 50, 10).reshape(2, 5).tolist() for model in (first, second)}
    return Comparison(
        plan=Plan("mine.yaml", (f"{first}.yaml", f"{second}.yaml"), 2, 5),
        splits=splits,
        costs={first: cost, second: dearer},
        verdicts=(Verdict("none", f"no measurable gain: keep {first}"),),
        curves=curves,
        seeds={first: [0, 1], second: [0, 2]},
        setting=("python compare.py <x>",),
        warnings=(f"{second} seed 1 failed: </p><script>",),
        examples=(picture,),
        offsets=(("<i>dcn</i>", b"\xff\xda"),),
    )
