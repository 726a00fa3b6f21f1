"""Every test runs on one thread from a fixed seed; GPU tests are skipped where there is no CUDA device."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_SeededFixtures())
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # and the programs that tests start: `make test` is two processes
    _signals_of_a_terminal()


def _signals_of_a_terminal() -> None:
    """As a person's shell leaves them, for this process and those it starts: a run in the background (``&``, nohup, a
    CI's runner) begins with Ctrl-C and hang-up ignored, and the tests that send them would see nothing come."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _interpret_triton() -> None:
    """Have this process's Triton kernels run in Triton's interpreter (tests/models/test_fused_dcn.py, and the plugin's,
    tests/deploy/test_plugin.py).

    Triton reads the switch when it and the kernels are imported; it is taken back at once, because with it the program
    under test accepts ``--dcn-backend triton`` on the CPU.
    """
    if importlib.util.find_spec("triton") is None:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        importlib.import_module("models.ops.dcn_kernels")
        importlib.import_module("deploy.tensorrt.plugin.kernels")
    finally:
        del os.environ["TRITON_INTERPRET"]


if not torch.cuda.is_available():
    # here and not in pytest_configure: before that, pytest imports the conftest.py of a folder that it was given, and
    # that of tests/deploy imports Triton
    _interpret_triton()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Names that are no UTF-8 (tests/cli/test_odd_surroundings.py) reach what a test printed, and a worker of
    pytest-xdist can send its report only as UTF-8."""
    report = yield
    report.sections = [(title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections]
    return report


class _SeededFixtures:
    """Fixtures that many tests share are made from a seed too, whatever test comes first. A plugin: pytest does not ask
    a conftest.py about fixtures of the whole session."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef) -> None:
        if fixturedef.scope != "function":
            _seed()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    _seed()


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder of values measured from upstream; tests/reference/README.md says how."""
    return ROOT / "tests" / "reference"
