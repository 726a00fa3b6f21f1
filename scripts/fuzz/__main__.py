"""Readers fed with damaged and hostile bytes.

python -m scripts.fuzz labels --inputs 100000      # or yaml, images, caches, checkpoint, wts; --seed for others of them
make fuzz                                          # all of them

Each input is read once. It is accepted, refused in one line (a UserError), or a crash: any other exception, a result
that breaks the reader's promise, or more than 5 seconds. Counts are printed; the exit status is 1 after a crash.
"""

from __future__ import annotations

import argparse
import importlib
import sys

TARGETS = {
    "labels": "label files",
    "yaml": "YAML files, as hyper-parameters and as models",
    "images": "pictures",
    "caches": "label caches",
    "checkpoint": "weights files",
    "wts": "weights as text (.wts)",
}
"""Name: what is read. Each is a module ``fuzz_NAME`` here with ``run(inputs, seed) -> Counts``."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.fuzz", description="Feed readers with hostile bytes.")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = importlib.import_module(f"scripts.fuzz.fuzz_{args.target}").run(args.inputs, args.seed)
    print(f"{TARGETS[args.target]}: {counts.text()}")
    return int(bool(counts.crashes))


if __name__ == "__main__":
    sys.exit(main())
