"""No garbage collection for a while."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    """Inside, a command imports what is heavy: torch, and what needs it.

    Importing torch makes 300,000 objects, which Python would look through for garbage again and again, a fifth of the
    time that the import takes, and once more later, also in every process forked from this one, whose memory then is
    no longer shared. They stay until the end anyway, so that they are taken out (gc.freeze). In another program, which
    calls this one and has objects of its own, nothing is changed.
    """
    if "torch" in sys.modules or not _is_command():
        yield
        return
    gc.collect()
    with collection_paused():
        try:
            yield
        finally:  # after Ctrl-C as well: a second one would come in the middle of looking through them
            gc.freeze()


def _is_command() -> bool:
    """Whether the program that runs is one of this repository's, and not one of an environment inside its folder,
    such as a notebook's."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is None:
        return False
    program, root = Path(file).resolve(), Path(__file__).resolve().parents[1]
    return program.is_relative_to(root) and not program.is_relative_to(Path(sys.prefix).resolve())
