"""Every fault and hostile input, run as a user would meet it; the outcomes as Markdown tables.

python -m scripts.faults                       # or: make faults
python -m scripts.faults accidents kills --kills 50
python -m scripts.faults --only 'YAML|cache'   # rows whose names match

The exit status is 1 when a promise was broken.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from datetime import date
from pathlib import Path

import torch

GROUPS = {"accidents": "scripts.faults.accidents", "kills": "scripts.faults.kills", "hostile": "scripts.faults.attack"}
"""Name: module with ``rows(only)``, which yields what has ``row()`` and ``broken`` (see scripts.faults.outcome), and,
where the columns are others, ``HEADER``. ``only`` is a pattern, empty for all rows."""

MARKS = ("<!-- faults -->", "<!-- /faults -->")
"""What --write replaces lies between them."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.faults", description="Run faults and hostile inputs.")
    parser.add_argument("group", nargs="*", choices=[[], *GROUPS], help=f"of {', '.join(GROUPS)}; all by default")
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose names match")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="random kill -9 (default: %(default)s)")
    parser.add_argument(
        "--write", type=Path, help=f"a Markdown file; what lies between {' and '.join(MARKS)} is replaced"
    )
    args = parser.parse_args()
    from scripts.faults.outcome import HEADER

    lines: list[str] = []
    say(
        lines,
        f"Printed by `python -m scripts.faults` on {date.today()}: Python {platform.python_version()}, "
        f"torch {torch.__version__}, CPU.",
    )
    total = broken = 0
    for group in args.group or GROUPS:
        module = importlib.import_module(GROUPS[group])
        say(lines, f"\n{getattr(module, 'HEADER', HEADER)}")
        for outcome in module.rows(args.only, args.kills) if group == "kills" else module.rows(args.only):
            say(lines, outcome.row())
            total, broken = total + 1, broken + bool(outcome.broken)
    say(lines, f"\n{total} faults, {broken} broken promises")
    if args.write:
        before, _, rest = args.write.read_text(encoding="utf-8").partition(MARKS[0])
        text = "\n".join((before + MARKS[0], *lines, MARKS[1] + rest.partition(MARKS[1])[2]))
        args.write.write_text(text, encoding="utf-8")
    return int(broken > 0)


def say(lines: list[str], text: str) -> None:
    """Print at once, and keep."""
    print(text, flush=True)
    lines.append(text)


if __name__ == "__main__":
    sys.exit(main())
