"""Label caches: a mutated .npz is either what a scan could have written, or scanned anew."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import numpy as np

from scripts.faults.hostile import bad_caches, dataset, good_cache
from scripts.fuzz.rounds import Counts, mutate, run_round
from utils.errors import DataError
from utils.label_cache import read_cache
from utils.label_table import CORRUPT, LabelTable
from utils.npz import NPZ_DAMAGE

WORDS = [
    b"\xff" * 8,
    bytes(8),
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"PK\x01\x02",
    b"\x93NUMPY",
    b"'|O'",
    b"'<f8'",
    b"'<U9'",
    b"(-1,)",
]
WORDS += [
    b"(9223372036854775807,)",
    b"True",
    b"cos\nsystem\n",
    b"[" * 50,
    b"null",
    b"-1",
    b'"',
    b"NaN",
    b"\x01",
    b"\x80\x7f",
]


def run(inputs: int, seed: int) -> Counts:
    """Read ``inputs`` mutated caches."""
    with tempfile.TemporaryDirectory() as folder:
        data = dataset(Path(folder))
        good = good_cache(data)
        corpus = [good, *(c for c in bad_caches(Path(folder), good).values() if len(c) < 90_000)]
        file = Path(folder) / "fuzz.npz"

        def make(rng: random.Random) -> bytes:
            return mutate(rng, corpus, WORDS)

        def attempt(content: bytes) -> None:
            file.write_bytes(content)
            try:
                table = read_cache(file, 6)
            except NPZ_DAMAGE as error:
                raise DataError(f"{type(error).__name__}") from None
            if table is not None:
                check_table(table)

        return run_round(make, attempt, inputs, seed)


def check_table(table: LabelTable) -> None:
    """Raise AssertionError unless every image has labels that a scan could have found; it can be used in any order."""
    turned = table.take(np.arange(len(table))[::-1])
    for number in range(len(table)):
        rows = turned.labels[turned.offsets[number] : turned.offsets[number + 1]]
        assert isinstance(turned.paths[number], str) and 0 <= turned.status[number] <= CORRUPT
        assert ((rows[:, 0] >= 0) & (rows[:, 0] < 6)).all()
        assert ((rows[:, 1:] >= 0) & (rows[:, 1:] <= 1)).all() and (rows[:, 3:] > 0).all()
