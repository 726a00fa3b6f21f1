"""Names that come from outside (class names, file names, addresses) made safe for folders, spreadsheets, terminals."""

from __future__ import annotations

import os
import re
import unicodedata

_RESERVED = {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(10)), *(f"lpt{i}" for i in range(10))}
MAX_STEM_BYTES = 220
MAX_NAME_BYTES = 120  # file systems allow 255; room is left for numbers and suffixes


def safe_folder_name(name: str, fallback: str) -> str:
    """``name`` as one folder name on any system: no separators, control characters, leading dots or device names.

    ``fallback`` is returned when nothing usable is left.
    """
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in name)
    text = re.sub(r'[/\\:*?"<>|]', "_", text)
    text = " ".join(text.split()).lstrip(". ").rstrip(". ")
    while len(text.encode("utf-8")) > MAX_NAME_BYTES:
        text = text[:-1].rstrip(". ")
    return fallback if not text or text.split(".")[0].casefold() in _RESERVED else text


def class_folders(names: dict[int, str]) -> dict[int, str]:
    """A folder name for each class, different from all others even where case does not count."""
    unique = UniqueNames()
    return {index: unique.take(safe_folder_name(name, f"class{index}")) for index, name in names.items()}


class UniqueNames:
    """Hands out ``name``, then ``name-2``, ``name-3``, ... so that nothing written in one run replaces another.

    Names that differ only in case count as equal.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._last: dict[str, int] = {}

    def take(self, name: str) -> str:
        """``name`` or the next free numbered form of it. ``name`` is a file's stem: its end is cut where numbers and
        a suffix would find no room in the 255 bytes that file systems allow."""
        while len(os.fsencode(name)) > MAX_STEM_BYTES:
            name = name[:-1]
        key, number, found = name.casefold(), self._last.get(name.casefold(), 0), ""
        while not found or found.casefold() in self._taken:
            number += 1
            found = name if number == 1 else f"{name}-{number}"
        self._taken.add(found.casefold())
        self._last[key] = number
        return found

    def holds_frames_of(self, stem: str) -> bool:
        """Whether a name handed out looks like a numbered frame, STEM_12, of a video called ``stem``."""
        pattern = re.compile(re.escape(stem.casefold()) + r"_\d+")
        return any(pattern.fullmatch(name) for name in self._taken)


# Signs that begin a formula (the wide ones too, in Japanese Excel), at the start of a cell or after what some
# spreadsheet splits cells at: a semicolon is the comma of half of Europe.
_FORMULA = re.compile(r"(^[\t\r\n]|(?:^|[;\t\r\n])\s*(?=[=+\-@＝＋－＠]))")


def spreadsheet_text(text: str) -> str:
    """Text for a CSV cell: what a spreadsheet would take for a formula (= + - @, tab, return) gets a leading quote."""
    return _FORMULA.sub(lambda found: f"'{found[0]}" if found.start() == 0 else f"{found[0]}'", text)


def printable(text: str, keep: str = "") -> str:
    """Text for one line of a terminal: control characters and line ends become their escapes, but those of ``keep``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


MAX_NAME = 200
"""Longest class name, in characters."""


def class_name_fault(name: str) -> str | None:
    """Why a text cannot be a class name (control characters, too long), or None."""
    if len(name) > MAX_NAME:
        return f"is longer than {MAX_NAME} characters ('{printable(name[:20])}...')"
    control = next((c for c in name if unicodedata.category(c) == "Cc"), None)
    return f"holds the control character {control!r}: write it as plain text" if control else None
