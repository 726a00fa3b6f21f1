"""What other processes draw and compute: the same files and numbers, and one line for what they cannot."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from utils import curves
from utils.errors import ResourceError
from utils.helpers import Helpers

ROOT = Path(__file__).resolve().parents[2]
LABELS = np.array([[0, 0.5, 0.5, 0.2, 0.1], [1, 0.2, 0.3, 0.1, 0.1]], np.float32)
NAMES = {0: "a", 1: "größe"}


def test_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths are those of the program, which may change nothing about where it is."""
    monkeypatch.chdir(tmp_path)
    with Helpers(cores=8) as helpers:
        helpers.draw("plot_labels", LABELS, NAMES, Path("other.png"))
        helpers.draw("plot_confidence_curve", np.linspace(0, 1, 9), np.ones((1, 9)), ["a"], "curve.png", "F1")
    curves.plot_labels(LABELS, NAMES, "own.png")
    assert Path("other.png").read_bytes() == Path("own.png").read_bytes()
    assert Path("curve.png").is_file()


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    helpers = Helpers(cores=1)
    helpers.draw("plot_labels", LABELS, NAMES, tmp_path / "no such folder" / "labels.png")
    helpers.draw("plot_labels", LABELS, NAMES, tmp_path / "labels.png")
    with pytest.raises(ResourceError, match="no such folder/labels.png: the picture cannot be written"):
        helpers.close()
    assert (tmp_path / "labels.png").is_file()


def test_helpers_end_with_a_run_that_fails(tmp_path: Path) -> None:
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt), Helpers(cores=8) as helpers:
        for number in range(50):
            helpers.draw("plot_labels", LABELS, NAMES, tmp_path / f"{number}.png")
        raise KeyboardInterrupt
    assert not multiprocessing.active_children()
    assert time.perf_counter() - start < 5


def test_ctrl_c_while_helpers_start_ends_those_that_did(monkeypatch: pytest.MonkeyPatch) -> None:
    submit = ProcessPoolExecutor.submit

    def interrupted(pool: ProcessPoolExecutor, *arguments: object) -> Future:
        future = submit(pool, *arguments)
        signal.raise_signal(signal.SIGINT)
        return future

    monkeypatch.setattr(ProcessPoolExecutor, "submit", interrupted)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        Helpers(cores=8)
    assert not multiprocessing.active_children() and threading.active_count() == before


def test_ctrl_c_while_they_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    faults: list = []
    monkeypatch.setattr(threading, "excepthook", faults.append)
    ctrl_c = threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), Helpers(cores=1, prepare=()) as helpers:
        helpers.begin(time.sleep, 600)
        ctrl_c.start()
    ctrl_c.join()
    assert not faults and not multiprocessing.active_children()


@pytest.mark.parametrize("idle", [True, False], ids=["idle", "busy"])
def test_a_helper_that_was_killed(tmp_path: Path, idle: bool) -> None:
    """Nothing is raised where the run stands, whatever was to be drawn before and after; close() tells."""
    helpers = Helpers(cores=1)
    [process] = multiprocessing.active_children()
    if not idle:
        helpers.draw("plot_labels", np.zeros((1_000_000, 5), np.float32), NAMES, tmp_path / "labels.png")
    process.kill()
    process.join()
    helpers.draw("plot_labels", LABELS, NAMES, tmp_path / "labels.png")
    with pytest.raises(ResourceError, match="was killed"):
        helpers.close()


def test_the_end_of_some_leaves_others_alone(tmp_path: Path) -> None:
    """Two runs in two threads of a program."""
    with Helpers(cores=1) as others:
        with Helpers(cores=1) as helpers:
            helpers.draw("plot_labels", LABELS, NAMES, tmp_path / "own.png")
        others.draw("plot_labels", LABELS, NAMES, tmp_path / "others.png")
    assert (tmp_path / "own.png").is_file() and (tmp_path / "others.png").is_file()


def test_results_and_errors_reach_who_asks_for_them() -> None:
    with Helpers(cores=8) as helpers:
        asked = [helpers.begin(divmod, number, 3) for number in range(9)]
        wrong = helpers.begin(divmod, 1, 0)
        assert helpers.count == 2 and [ask() for ask in asked] == [divmod(number, 3) for number in range(9)]
        with pytest.raises(ZeroDivisionError):
            wrong()


def test_what_a_lost_helper_had_to_compute_is_computed_here() -> None:
    helpers = Helpers(cores=1)
    lost, next_one = helpers.begin(_end_in_a_helper, os.getpid()), helpers.begin(divmod, 7, 3)
    assert lost() == "here" and next_one() == (2, 1)
    assert helpers.begin(divmod, 8, 3)() == (2, 2)
    helpers.close()  # no diagram is missing


def _end_in_a_helper(program: int) -> str:
    if os.getpid() != program:
        os.kill(os.getpid(), signal.SIGKILL)
    return "here"


def test_what_cannot_be_prepared_is_told_by_what_needs_it() -> None:
    with Helpers(cores=1, prepare=[_not_installed]) as helpers:
        assert helpers.begin(divmod, 7, 3)() == (2, 1)


def _not_installed() -> None:
    raise ImportError


# a program without a guard: if helpers ran it again, they would print, import torch and start helpers of their own
PROGRAM = """
import os, sys
sys.modules["torch"] = sys
print("begun")
from utils.helpers import Helpers
with Helpers(cores=1) as helpers:
    seen = helpers._pool.submit(eval, "'torch' in __import__('sys').modules, __import__('os').getpid()").result()
    print(*seen, flush=True)
    {then}
"""


def test_a_helper_does_not_run_the_program_again(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(then="pass"), encoding="utf-8")
    said = subprocess.run([sys.executable, script], env=_environment(), capture_output=True, text=True, timeout=60)
    assert said.stdout.splitlines()[0] == "begun" and said.stdout.splitlines()[1].startswith("False ")
    assert (said.returncode, said.stderr, said.stdout.count("begun")) == (0, "", 1)


def test_signals_are_for_the_program_and_helpers_end_with_it(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(then="import time; time.sleep(60)"), encoding="utf-8")
    with subprocess.Popen([sys.executable, script], env=_environment(), stdout=subprocess.PIPE, text=True) as program:
        program.stdout.readline()
        helper = int(program.stdout.readline().split()[1])
        os.kill(helper, signal.SIGINT)
        assert os.getsid(helper) == helper and program.poll() is None
        program.kill()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{helper}/cmdline").exists() and Path(f"/proc/{helper}/cmdline").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}
