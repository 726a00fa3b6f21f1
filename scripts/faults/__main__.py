"""Every fault and hostile input, run as a user would meet it; the outcomes as a Markdown table.

python -m scripts.faults                       # or: make faults
python -m scripts.faults --only 'YAML|cache'   # rows whose names match

The exit status is 1 when a promise was broken.
"""

from __future__ import annotations

import argparse
import importlib
import sys

GROUPS = {"hostile": "scripts.faults.attack"}
"""Name: module with ``rows(only) -> Iterator[Outcome]``; ``only`` is a pattern, empty for all rows."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.faults", description="Run faults and hostile inputs.")
    parser.add_argument("group", nargs="*", choices=[[], *GROUPS], help=f"of {', '.join(GROUPS)}; all by default")
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose names match")
    args = parser.parse_args()
    from scripts.faults.outcome import HEADER

    print(HEADER, flush=True)
    total = broken = 0
    for group in args.group or GROUPS:
        for outcome in importlib.import_module(GROUPS[group]).rows(args.only):
            print(outcome.row(), flush=True)
            total, broken = total + 1, broken + bool(outcome.broken)
    print(f"\n{total} faults, {broken} broken promises")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
