"""A process is known to have ended by its name, and only then."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

import utils.process_name
from utils.files import ROOT
from utils.process_name import has_ended, process_name

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="process names are Linux's")
SAYS_ITS_NAME = (
    "import sys; from utils.process_name import process_name; print(process_name(), flush=True); sys.stdin.read()"
)


@linux
def test_a_process_has_ended_when_it_is_killed_even_if_nobody_has_waited_for_it() -> None:
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", SAYS_ITS_NAME], cwd=ROOT, **pipes) as other:
        name = other.stdout.readline().strip()
        assert name and not has_ended(name)
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert has_ended(name)  # a zombie
        other.wait()
        assert has_ended(name)


@linux
def test_another_process_of_the_same_number_is_another() -> None:
    assert not has_ended(process_name())
    assert has_ended(process_name() + "1")


@linux
def test_a_program_may_be_called_as_it_likes() -> None:
    """The kernel cuts names at 15 bytes, here in the middle of a letter."""
    set_name, libc = 15, ctypes.CDLL(None)
    before = Path("/proc/self/comm").read_bytes().strip()
    try:
        assert libc.prctl(set_name, ") тренировка".encode(), 0, 0, 0) == 0
        assert process_name() and not has_ended(process_name())
    finally:
        libc.prctl(set_name, before, 0, 0, 0)


@linux
def test_a_process_that_proc_hides_has_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc mounted with hidepid: what cannot be seen may still be there."""
    name = process_name()
    for part in ("sys", "self"):
        (tmp_path / part).symlink_to(Path("/proc") / part)
    monkeypatch.setattr(utils.process_name, "PROC", tmp_path)
    assert not has_ended(name)
    assert process_name() == ""


def test_nothing_is_said_of_other_machines_and_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_ended("") and not has_ended("host 8b7f pid:[1] time:[1] 99999999 1")
    monkeypatch.setattr(utils.process_name, "PROC", tmp_path)  # no Linux
    assert process_name() == "" and not has_ended("host 8b7f pid:[1] time:[1] 99999999 1")
