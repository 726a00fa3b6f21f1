"""A name for a process by which others on the same machine can tell that it has ended."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")


def process_name() -> str:
    """Of this process: its machine and containers, its number there, and when it began.

    '' where there is no Linux /proc to read that in, or one of another container.
    """
    with suppress(OSError, ValueError, IndexError):
        if os.readlink(PROC / "self") == str(os.getpid()):
            return f"{_machine()} {os.getpid()} {_began(os.getpid())}"
    return ""


def has_ended(name: str) -> bool:
    """Whether the process of that :func:`process_name` is gone, or a zombie. False for one of another machine or
    container, of which nothing can be known here."""
    with suppress(OSError, ValueError, IndexError):
        machine, number, began = name.rsplit(" ", 2)
        if machine == _machine():
            return not _is_there(int(number)) or _began(int(number)) != began
    return False


def _machine() -> str:
    """What must be the same for process numbers and times to mean the same: host, start of its kernel, namespaces."""
    boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    spaces = [PROC / "self/ns" / kind for kind in ("pid", "time")]  # old kernels have no namespaces of time
    return " ".join((socket.gethostname(), boot, *(os.readlink(space) for space in spaces if space.is_symlink())))


def _is_there(number: int) -> bool:
    """Asked of the kernel: /proc can be mounted so that it hides the processes of others."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _began(number: int) -> str:
    """When a process began, in ticks since the machine did (proc(5), stat, field 22); 'ended' for a zombie."""
    # bytes: the kernel cuts the program's name, which comes before, wherever 15 of them end
    fields = (PROC / str(number) / "stat").read_bytes().rpartition(b")")[2].decode("ascii").split()
    return "ended" if fields[0] in "ZX" else fields[19]
