"""The trainings of a comparison: kept when finished, gone on with when interrupted, one failure beside the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from comparison.costs import peak_memory_gb
from comparison.measuring import finished_runs
from comparison.plan import Folder, Plan, begin, merged, newest_comparison, read_plan
from comparison.trainings import Settings, last_line, read_seconds, train_all
from utils.errors import ConfigError, ResourceError
from utils.files import ROOT


def plan_of(*models: str, seeds: int = 2) -> Plan:
    return Plan("/d/mine.yaml", tuple(f"/m/{model}.yaml" for model in models), seeds, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "exp"
    path.mkdir()
    return path


def conduct(path: Path, plan: Plan, jobs: int = 2) -> dict:
    with Folder(path) as folder:
        begin(folder, plan)
        return train_all(plan, folder, Settings(jobs=jobs))


def test_finished_trainings_are_kept(folder: Path, fake_train: Path) -> None:
    plan = plan_of("plain", "dcn")
    assert conduct(folder, plan) == {}
    logs = sorted((folder / "trainings").glob("*.log"))
    assert [log.stem for log in logs] == ["dcn-seed0", "dcn-seed1", "plain-seed0", "plain-seed1"]
    assert conduct(folder, plan_of("plain", "dcn", seeds=3)) == {}
    assert all(log.read_text() == "begins anew\n" for log in logs)
    assert all(read_seconds(log.with_suffix(".seconds")) > 0 for log in logs)
    assert (folder / "trainings" / "dcn-seed2.log").is_file()
    for lost in ("dcn-seed1.seconds", "dcn-seed0/weights/best.pt"):
        (folder / "trainings" / lost).unlink()
        with pytest.raises(ConfigError, match=rf"{lost}: missing or damaged; remove .* to train dcn seed"):
            finished_runs(plan, Folder(folder))


def test_one_failure_is_told_in_a_line_and_the_rest_goes_on(folder: Path, fake_train: Path) -> None:
    plan = plan_of("plain", "broken", seeds=1)
    failed = conduct(folder, plan, jobs=1)
    (line,) = failed.values()
    assert line.startswith(
        "broken seed 0 failed (exit status 1): error: broken.yaml:3: the rod is out of skew \\x1b[2J"
    )
    assert str(folder / "trainings" / "broken-seed0.log") in line
    assert list(finished_runs(plan, Folder(folder))) == ["plain"]
    with pytest.raises(ConfigError, match="no training of broken finished"):
        finished_runs(plan_of("broken", "plain", seeds=1), Folder(folder))
    assert list(conduct(folder, plan)) == list(failed)
    assert (folder / "trainings" / "broken-seed0.log").read_text().count("begins again") == 1


def test_ctrl_c_lets_trainings_save_and_says_how_to_go_on(folder: Path, fake_train: Path) -> None:
    plan = plan_of("slow", "plain", seeds=1)
    log = folder / "trainings" / "slow-seed0.log"

    def interrupt() -> None:
        while not (log.is_file() and log.read_text()):
            time.sleep(0.02)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        conduct(folder, plan)
    assert "terminated: saved" in log.read_text()
    assert conduct(folder, plan) == {}
    assert log.read_text().endswith("begins again\n")


KILLED = """
import sys
from pathlib import Path
import comparison.trainings as t
from comparison.plan import Folder, Plan, begin
t.ROOT = Path(sys.argv[2])
plan = Plan("/d/mine.yaml", ("/m/slow.yaml",), 1, 1)
with Folder(Path(sys.argv[1])) as folder:
    begin(folder, plan)
    t.train_all(plan, folder, t.Settings())
"""


def test_after_a_kill_its_trainings_keep_the_folder_closed(folder: Path, fake_train: Path) -> None:
    """Two processes that train into the same folder would destroy it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder), str(fake_train)], env=env)
    log = folder / "trainings" / "slow-seed0.log"
    while not (log.is_file() and log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    with pytest.raises(ResourceError, match="still works here"):
        conduct(folder, plan_of("slow", seeds=1))
    child = next(p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if _command_of(p, folder))
    os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while _holds_files(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert conduct(folder, plan_of("slow", seeds=1)) == {}
    assert log.read_text() == "begins anew\nbegins again\n"


def _holds_files(pid: int) -> bool:
    """Until it is a zombie, or gone; its command line goes before its files and their locks do."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _command_of(pid: int, folder: Path) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"train.py" in words and bytes(folder) in words


def test_a_later_start_may_add_but_not_change_the_budget(folder: Path) -> None:
    plan = plan_of("plain", "dcn")
    with Folder(folder) as opened:
        begin(opened, plan)
    stored = read_plan(folder)
    assert stored == plan and newest_comparison(folder.parent) == folder
    grown = merged(stored, Plan("/d/mine.yaml", ("/m/other.yaml",), 3, 1), folder)
    assert grown.models == ("plain", "dcn", "other") and grown.seeds == 3
    with pytest.raises(ConfigError, match=r"--epochs 2: .* was begun with 1"):
        merged(stored, Plan("/d/mine.yaml", plan.cfg, 2, 2), folder)
    with pytest.raises(ConfigError, match=r"flags after --: --cos-lr: .* was begun with nothing"):
        merged(stored, Plan("/d/mine.yaml", plan.cfg, 2, 1, extra=("--cos-lr",)), folder)


@pytest.mark.parametrize(
    "line", ["seeds: many", "cfg: plain.yaml", "extra: [1]", "epochs: 0", "cfg: [a.yaml, b/a.yaml]"]
)
def test_a_damaged_plan_is_one_line(folder: Path, line: str) -> None:
    lines = {"data": "d", "cfg": "[a.yaml]", "seeds": "1", "epochs": "1", "batch_size": "1", "imgsz": "64"}
    lines |= {"weights": "''", "extra": "[]", line.split(":")[0]: line.split(": ")[1]}
    (folder / "compare.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    with pytest.raises(ConfigError, match=line.split(":")[0]):
        read_plan(folder)


def test_logs_are_read_for_what_reports_need(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    assert last_line(log) == "" and peak_memory_gb([log]) is None
    log.write_text("      0/1      1.25G    0.1\n      1/1      2.5G   0.1\n10%|# |\r100%|##|\r\n  \n")
    assert last_line(log) == "100%|##|" and peak_memory_gb([log]) == 2.5
    log.write_text("      0/1         0G    0.1\n")
    assert peak_memory_gb([log]) is None
    assert read_seconds(log) == 0
