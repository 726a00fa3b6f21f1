"""Confidence intervals from few numbers: Student's t, Welch's difference, and how two sources of chance add up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Of all intervals here."""

_GRID = 20_000


@dataclass(frozen=True)
class Interval:
    """``mean`` plus or minus ``half``; ``half`` is None where it cannot be known (a single number has no spread)."""

    mean: float
    half: float | None = None

    def scaled(self, factor: float) -> Interval:
        """The interval in other units."""
        return Interval(self.mean * factor, None if self.half is None else self.half * factor)


@dataclass(frozen=True)
class Difference:
    """What a model has more than another, as an interval, with the two sources of chance that it is made of."""

    mean: float
    half: float | None
    seeds_half: float | None
    """Part of ``half`` from the luck of trainings; None when a model has a single one."""
    images_half: float
    """Part of ``half`` from which images the split happens to hold."""


def t_quantile(p: float, df: float) -> float:
    """The value that Student's t with ``df`` >= 1 (not necessarily whole) degrees of freedom stays below with
    probability ``p`` in 0.5..1.

    With t = sqrt(df) tan(a) the density of the angle a is proportional to cos(a) ** (df - 1), which is smooth and
    bounded: integrated on a grid, relative error below 1e-5.
    """
    if df < 1 or not 0.5 <= p < 1:
        raise ValueError(f"t_quantile({p}, {df}): p in 0.5..1, df >= 1")
    widest = math.pi / 2 if df < 30 else min(math.pi / 2, 12 / math.sqrt(df))  # beyond, nothing is left to integrate
    angle = np.linspace(0, widest, _GRID + 1)
    density = np.cos(angle) ** (df - 1)
    area = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    return math.sqrt(df) * math.tan(float(np.interp(2 * p - 1, area / area[-1], angle)))


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of ``values`` (n,) with its t interval of n - 1 degrees of freedom; NaN for none."""
    if not len(values):
        return Interval(math.nan)
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, t_quantile((1 + LEVEL) / 2, len(values) - 1) * error)


def welch_half(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Half the width of Welch's interval of mean(a) - mean(b), for groups of unequal spread; None when one of them has
    fewer than two numbers.

    Seeds are not paired: a seed says in which order pictures come, not how lucky two different networks are with it.
    """
    if min(len(a), len(b)) < 2:
        return None
    parts = [float(np.var(values, ddof=1)) / len(values) for values in (a, b)]
    error = sum(parts)
    if error == 0:
        return 0.0
    df = error**2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a, b)))
    return t_quantile((1 + LEVEL) / 2, max(df, 1.0)) * math.sqrt(error)


def central_half(values: np.ndarray) -> float:
    """Half the width of the central 95 % of ``values`` (n,), NaN left out."""
    low, high = np.nanpercentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(high - low) / 2


def difference(a: Sequence[float], b: Sequence[float], resampled: np.ndarray) -> Difference:
    """mean(a) - mean(b) of the seeds of two models. ``resampled`` (n,): the same difference on resampled images.

    Both sources of chance are independent, so their half widths add up as squares.
    """
    seeds, images = welch_half(a, b), central_half(resampled)
    half = None if seeds is None else math.hypot(seeds, images)
    return Difference(float(np.mean(a) - np.mean(b)), half, seeds, images)
