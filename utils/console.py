"""What the terminal shows: log lines of rank 0 and a progress bar. Colour only where a person is looking."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from utils.safe_names import printable

LOGGER = logging.getLogger("dcn_yolov5")
"""The repository's logger: silent until a script calls :func:`setup_console` (libraries do not print)."""
LOGGER.addHandler(logging.NullHandler())


class _Stdout(logging.Handler):
    """Writes to whatever sys.stdout is now (a test or a notebook may have replaced it), above a running bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(encodable(_obedient(self.format(record))), file=sys.stdout)


_OWN_STYLES = re.compile(r"(\033\[[\d;]{1,8}m)")


def _obedient(text: str) -> str:
    """``text`` whose control characters are shown as escapes, but for line ends, tabs and colours: it may quote file
    and class names, which must not move the cursor or rename the window."""
    if text.isprintable():
        return text
    parts = _OWN_STYLES.split(text)
    parts[::2] = [printable(part, keep="\n\t") for part in parts[::2]]
    return "".join(parts)


def encodable(text: str) -> str:
    """``text`` with what stdout's encoding lacks as escapes: file names may hold bytes that are no text at all."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


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
    """A tqdm bar over ``iterable`` with the count, rate and time left; where no person is looking (a file, a pipe)
    one line at the end instead. ``enabled=False`` (other ranks) shows nothing. The result is iterable and has
    ``set_description(text, refresh)`` and ``close()``."""
    if enabled and not sys.stdout.isatty():
        return _LastLine(iterable, total, desc)
    from tqdm import tqdm

    bar = "{l_bar}{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return tqdm(iterable, total=total, desc=desc, disable=not enabled, bar_format=bar, file=sys.stdout, **kwargs)


class _LastLine:
    """What :func:`progress` gives when stdout is no terminal: counts, and writes its description once, at the end."""

    def __init__(self, iterable: Iterable, total: int | None, desc: str) -> None:
        self._iterable, self._desc, self._count = iterable, desc, 0
        self._total = total if total is not None or not hasattr(iterable, "__len__") else len(iterable)
        self._start, self._open = time.perf_counter(), True

    def __iter__(self) -> Iterator:
        for item in self._iterable:
            yield item
            self._count += 1
        self.close()

    def set_description(self, text: str, refresh: bool = True) -> None:
        self._desc = text

    def close(self) -> None:
        if self._open and (self._desc or self._count):
            seconds = time.perf_counter() - self._start
            total = "" if self._total is None else f"/{self._total}"
            print(encodable(f"{printable(self._desc)}: {self._count}{total} [{seconds:.1f}s]"), flush=True)
        self._open = False


def plural(count: int, noun: str, plural_form: str | None = None) -> str:
    """``1 image``, ``2 images``."""
    return f"{count:,} {noun if count == 1 else plural_form or noun + 's'}"
