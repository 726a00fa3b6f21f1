"""Keeps a second process from working in a folder that one has for itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import ResourceError


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """``folder`` is this process's while inside, also after a crash no longer. Raises ResourceError when another has
    it. Where nothing can be locked (Windows, some network file systems) nothing is.

    A record lock on FOLDER/.lock: unlike those of flock, forked processes do not hold it, as loader processes outlive a
    training that was killed by seconds in which another may take it up.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # either, by POSIX
            raise ResourceError(
                f"{folder}: another process still writes there: wait for it or end it (see `ps -ef`), or use another "
                f"--name"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
