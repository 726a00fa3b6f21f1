"""What all fuzz targets share: mutated inputs from a seed, and the count of what became of them."""

from __future__ import annotations

import random
import resource
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from utils.errors import UserError

SLOW = 5.0
"""Seconds after which a small input counts as a crash."""


@dataclass
class Counts:
    """What became of the inputs. ``crashes``: the first lines of each, with the input that did it."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0
    megabytes: int = 0
    """Peak of the process, libraries included."""

    def text(self) -> str:
        """``100 inputs: 1 accepted, 99 refused, 0 crashes; 2 s, the slowest 3 ms, 90 MB at most`` and what crashed."""
        line = f"{self.inputs:,} inputs: {self.accepted:,} accepted, {self.refused:,} refused, "
        line += f"{len(self.crashes):,} crashes; {self.seconds:.0f} s, the slowest {self.slowest * 1000:.0f} ms, "
        line += f"{self.megabytes:,} MB at most"
        return "\n".join([line, *self.crashes[:5]])


def run_round(
    make: Callable[[random.Random], bytes], attempt: Callable[[bytes], None], inputs: int, seed: int
) -> Counts:
    """Feed ``attempt`` with ``inputs`` results of ``make``, each from a generator seeded by (seed, number).

    ``attempt`` returns for an input that was accepted and raises UserError for one that was refused.
    """
    counts, begin = Counts(), time.perf_counter()
    for number in range(inputs):
        data = make(random.Random(f"{seed}/{number}"))
        start = time.perf_counter()
        counts.inputs += 1
        try:
            attempt(data)
            counts.accepted += 1
        except UserError as error:
            counts.refused += 1
            if len(str(error).splitlines()) > 1:
                counts.crashes.append(f"input {number}: more than one line: {str(error)!r}")
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{place.filename}:{place.lineno}"
            counts.crashes.append(f"input {number}: {type(error).__name__} {error} ({where}): {data[:200]!r}")
        took = time.perf_counter() - start
        counts.slowest = max(counts.slowest, took)
        if took > SLOW:
            counts.crashes.append(f"input {number}: took {took:.1f} s: {data[:200]!r}")
    counts.megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    counts.seconds = time.perf_counter() - begin
    return counts


def mutate(rng: random.Random, corpus: Sequence[bytes], words: Sequence[bytes], most: int = 6) -> bytes:
    """One of ``corpus`` with up to ``most`` changes: bytes flipped, cut, doubled, moved, or replaced by ``words``."""
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.randint(0, most)):
        a, b = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        b = min(b, a + rng.choice((1, 4, 16, 256, len(data))))
        change = rng.randrange(7)
        if change == 0 and data:
            data[min(a, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[a:a] = rng.randbytes(rng.randint(1, 8))
        elif change == 2:
            del data[a:b]
        elif change == 3:
            data[a:a] = data[a:b] * rng.randint(1, 3)
        elif change == 4:
            data[a:b] = rng.choice(words)
        elif change == 5:
            data[a:a] = rng.choice(words)
        else:
            other = rng.choice(corpus)
            data[a:] = other[rng.randint(0, len(other)) :]
    return bytes(data[:100_000])
