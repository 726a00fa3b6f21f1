"""Garbage collection stops while it is told to, and imports that last are left out of it."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch  # noqa: F401  # what lasting_imports looks for

from utils.files import ROOT
from utils.gc_pause import collection_paused, lasting_imports

IMPORTS = """
import gc, sys
from utils.gc_pause import lasting_imports
sys.modules["__main__"].__file__ = sys.argv[1]
try:
    with lasting_imports():
        import torch
        print(gc.isenabled())
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print(gc.isenabled(), gc.get_freeze_count() > 100_000)
"""


@pytest.mark.parametrize("enabled", [True, False])
def test_a_pause_ends_as_it_began(enabled: bool) -> None:
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ZeroDivisionError), collection_paused():
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


NOTEBOOK = f"{sys.prefix}/lib/python3/site-packages/ipykernel_launcher.py"


@pytest.mark.parametrize(
    ("program", "said"),
    [("train.py", "False True True"), ("/usr/mine.py", "True True False"), (NOTEBOOK, "True True False")],
)
def test_what_torch_made_is_not_looked_through_again_in_a_command(program: str, said: str) -> None:
    """Also after Ctrl-C, where the next one would come in the middle of it. A caller's own objects may be garbage."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == said.split()


def test_a_program_that_has_torch_keeps_its_garbage_collection() -> None:
    before = gc.get_freeze_count()
    with lasting_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
