"""A process is known to have ended by its name, and only then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import utils.process_name
from utils.files import ROOT
from utils.process_name import has_ended, process_name

SAYS_ITS_NAME = (
    "import sys; from utils.process_name import process_name; print(process_name(), flush=True); sys.stdin.read()"
)


def test_a_process_has_ended_when_it_is_killed_even_if_nobody_has_waited_for_it() -> None:
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", SAYS_ITS_NAME], cwd=ROOT, **pipes) as other:
        name = other.stdout.readline().strip()
        assert name and not has_ended(name)
        other.kill()
        other.stdout.read()  # the end of it
        assert has_ended(name)  # a zombie
        other.wait()
        assert has_ended(name)


def test_another_process_of_the_same_number_is_another() -> None:
    assert not has_ended(process_name())
    assert has_ended(process_name() + "1")


def test_nothing_is_said_of_other_machines_and_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_ended("") and not has_ended("8b7f pid:[1] 99999999 1")
    monkeypatch.setattr(utils.process_name, "PROC", tmp_path)  # no Linux
    assert process_name() == "" and not has_ended("8b7f pid:[1] 99999999 1")
