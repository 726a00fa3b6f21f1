"""How many cores there are."""

from __future__ import annotations

import multiprocessing
import os


def available_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def may_have_children() -> bool:
    """Whether this process may start others: Python allows it to none that is a daemon itself."""
    return not multiprocessing.current_process().daemon
