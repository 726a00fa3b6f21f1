"""What the terminal shows: log lines of rank 0 and a progress bar. Colour only where a person is looking."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from typing import Any

LOGGER = logging.getLogger("dcn_yolov5")
"""The repository's logger: silent until a script calls :func:`setup_console` (libraries do not print)."""
LOGGER.addHandler(logging.NullHandler())


class _Stdout(logging.Handler):
    """Writes to whatever sys.stdout is now (a test or a notebook may have replaced it), above a running bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stdout)


def setup_console(main_process: bool = True, quiet: bool = False) -> None:
    """Send INFO lines to stdout in the main process, only warnings elsewhere. Calling it again changes nothing."""
    if not any(isinstance(h, _Stdout) for h in LOGGER.handlers):
        handler = _Stdout()
        handler.setFormatter(_Formatter())
        LOGGER.addHandler(handler)
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO if main_process and not quiet else logging.WARNING)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return colour("WARNING ", "yellow") + text if record.levelno >= logging.WARNING else text


def colour(text: str, *styles: str) -> str:
    """``text`` in ANSI styles (blue, green, yellow, red, bold) when stdout is a terminal, else unchanged."""
    codes = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "bold": "1"}
    if not sys.stdout.isatty():
        return text
    return f"\033[{';'.join(codes[s] for s in styles)}m{text}\033[0m"


def progress(iterable: Iterable, total: int | None = None, desc: str = "", enabled: bool = True, **kwargs: Any) -> Any:
    """A tqdm bar over ``iterable`` with the count, rate and time left; without a terminal it prints one line at the
    end instead of thousands. ``enabled=False`` (other ranks) shows nothing. The result has ``set_description`` and
    ``close`` like any tqdm bar."""
    from tqdm import tqdm

    bar = "{l_bar}{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    interval = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        iterable,
        total=total,
        desc=desc,
        disable=not enabled,
        bar_format=bar,
        mininterval=interval,
        maxinterval=max(interval, 10.0),
        file=sys.stdout,
        **kwargs,
    )


def plural(count: int, noun: str, plural_form: str | None = None) -> str:
    """``1 image``, ``2 images``."""
    return f"{count:,} {noun if count == 1 else plural_form or noun + 's'}"


def chunks(items: list, size: int) -> Iterator[list]:
    """Consecutive slices of at most ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
