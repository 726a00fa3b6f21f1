"""run_cli: what a user can mend is one line; and torch's threads share the cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from utils.errors import run_cli
from utils.files import ROOT


def test_a_package_that_is_not_installed(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv):
        raise ModuleNotFoundError("No module named 'cv2'", name="cv2")

    assert run_cli(main, []) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: opencv-python-headless is not installed for {sys.executable}: ")
    assert text.count("\n") == 1


def test_a_module_of_our_own_that_is_missing_is_a_bug() -> None:
    def main(argv):
        raise ModuleNotFoundError("No module named 'utils.nothing'", name="utils.nothing")

    with pytest.raises(ModuleNotFoundError):
        run_cli(main, [])


@pytest.mark.parametrize(
    ("given", "seen"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_waiting_threads_sleep_soon(given: dict[str, str], seen: str) -> None:
    code = "import os, utils.errors as e; e.run_cli(lambda argv: print(os.environ.get('GOMP_SPINCOUNT')), [])"
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean | given, capture_output=True, text=True)
    assert done.stdout.strip() == seen
