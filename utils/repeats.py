"""Values that come again."""

from __future__ import annotations

import numpy as np


def earlier(values: np.ndarray) -> np.ndarray:
    """(n,) how often each of ``values`` (n,) came before it."""
    order = np.argsort(values, kind="stable")
    ranked, place = values[order], np.arange(len(values))
    first = np.ones(len(values), bool)
    first[1:] = ranked[1:] != ranked[:-1]
    count = np.empty_like(place)
    count[order] = place - np.maximum.accumulate(np.where(first, place, 0))
    return count
