"""Every fault and hostile input, run as a user would meet it; the outcomes as Markdown tables.

python -m scripts.faults                       # or: make faults
python -m scripts.faults accidents kills --kills 50
python -m scripts.faults --only 'YAML|cache'   # rows whose names match

The exit status is 1 when a promise was broken.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch

GROUPS = {"accidents": "scripts.faults.accidents", "kills": "scripts.faults.kills", "hostile": "scripts.faults.attack"}
"""Name: module with ``rows(only)``, which yields what has ``row()`` and ``broken`` (see scripts.faults.outcome), and,
where the columns are others, ``HEADER``. ``only`` is a pattern, empty for all rows."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.faults", description="Run faults and hostile inputs.")
    parser.add_argument(
        "group", nargs="*", choices=[[], *GROUPS], metavar="GROUP", help=f"of {', '.join(GROUPS)}; all by default"
    )
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose names match")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="random kill -9 (default: %(default)s)")
    parser.add_argument(
        "--write", type=Path, metavar="FILE.md", help="a file with marks for each group, for the tables"
    )
    args = parser.parse_args()
    total = broken = 0
    for group in args.group or GROUPS:
        lines = list(table(group, args.only, args.kills))
        total, broken = total + len(lines), broken + sum(bad for _, bad in lines)
        if args.write:
            write_table(args.write, group, [line for line, _ in lines])
    print(f"\n{total} faults, {broken} broken promises")
    return int(broken > 0)


def table(group: str, only: str, kills: int) -> Iterator[tuple[str, bool]]:
    """The rows of a group, printed as they come, and whether a promise was broken."""
    from scripts.faults.outcome import HEADER

    module = importlib.import_module(GROUPS[group])
    print(f"\n{getattr(module, 'HEADER', HEADER)}", flush=True)
    for outcome in module.rows(only, kills) if group == "kills" else module.rows(only):
        print(outcome.row(), flush=True)
        yield outcome.row(), bool(outcome.broken)


def write_table(path: Path, group: str, rows: list[str]) -> None:
    """Replace what lies between a group's marks."""
    from scripts.faults.outcome import HEADER

    start, end = f"<!-- faults: {group} -->", f"<!-- end of {group} -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(start)
    header = getattr(importlib.import_module(GROUPS[group]), "HEADER", HEADER)
    made = f"`python -m scripts.faults {group}`, {date.today()}, torch {torch.__version__}, CPU."
    text = "\n".join((before + start, made, "", header, *rows, end + rest.partition(end)[2]))
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
