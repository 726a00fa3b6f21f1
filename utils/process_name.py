"""A name for a process by which others on the same machine can tell that it has ended."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")


def process_name() -> str:
    """Of this process: the machine's start, the namespace of its process numbers, its number and when it began.

    '' where there is no Linux /proc to read that in.
    """
    with suppress(OSError):
        return f"{_machine()} {os.getpid()} {_began(os.getpid())}"
    return ""


def has_ended(name: str) -> bool:
    """Whether the process of that :func:`process_name` is gone, or a zombie. False for one of another machine or
    container, of which nothing can be known here."""
    with suppress(OSError, ValueError):
        machine, number, began = name.rsplit(" ", 2)
        if machine == _machine():
            with suppress(FileNotFoundError, ProcessLookupError):
                return _began(int(number)) != began
            return True
    return False


def _machine() -> str:
    boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink(PROC / 'self/ns/pid')}"


def _began(number: int) -> str:
    """When a process began, in ticks since the machine did (proc(5), stat, field 22); 'ended' for a zombie."""
    fields = (PROC / str(number) / "stat").read_text().rpartition(")")[2].split()
    return "ended" if fields[0] in "ZX" else fields[19]
