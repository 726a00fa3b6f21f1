"""No garbage collection for a while."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Inside, Python looks for no cycles; afterwards it does if it did before."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Inside, what is heavy is imported: torch, and what needs it.

    Importing torch makes 300,000 objects, which Python would look through for garbage again and again, a fifth of the
    time that the import takes, and once more later, also in every process forked from this one, whose memory then is
    no longer shared. They stay until the end anyway, so that they are taken out (gc.freeze). Where torch is loaded
    already, in a program that calls this one, nothing is changed.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.collect()
    with collection_paused():
        yield
        gc.freeze()
