"""From an arm's record to what became of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.collapse.record import Course

LOST = 0.9
"""Share of a layer's samples outside the image from which on it counts as lost."""
LEARNED = 0.5
"""Share of the way from BLIND's loss to CONTROL's that counts as training."""
CONTROL, BLIND = "plain+clip", "plain+clip+blind"

PROGRESS = 0.05
"""By how much of it the control must be below the loss of a constant before others can be measured by it."""

TRAINS, STALLED, ESCAPED, DIVERGED, UNCLEAR = "trains", "stalls", "escapes", "diverges", "too short to say"


@dataclass(frozen=True)
class Finding:
    """``state``: escapes (no gradient reaches the stem, or a layer has LOST its samples at the end, whatever becomes of
    its constant output: BatchNorm amplifies what is left of its variance, and gradients may overflow), diverges (loss
    or gradients stop being finite without that), stalls (its last loss is nearer to BLIND's than LEARNED), trains;
    "too short to say" where the control is not better than a constant either. ``died_at``: step from which on it
    stayed so, NaN if never. ``last_loss``: mean over the last fifth. ``learned``: 0 at the loss of a constant, 1 at
    the control's."""

    course: Course
    state: str
    died_at: float
    first_loss: float
    last_loss: float
    learned: float

    @property
    def died(self) -> bool:
        return self.state not in (TRAINS, UNCLEAR)

    def median(self, column: str) -> float:
        return _finite(np.median, self.course.columns[column])

    def lowest(self, column: str) -> float:
        return _finite(np.min, self.course.columns[column])

    def last(self, column: str) -> float:
        return float(self.course.columns[column][-1])

    def peak(self, column: str) -> float:
        """Largest value over layers and steps."""
        return _finite(np.max, self.course.layers(column))

    def extent(self, column: str) -> tuple[float, float]:
        """Smallest and largest mean of a layer over the steps."""
        means = [_finite(np.mean, layer) for layer in self.course.layers(column)]
        return (min(means), max(means)) if means else (math.nan, math.nan)

    def escaped_at(self, share: float) -> float:
        """First step at which a layer had that share of its samples outside."""
        return _first(self.course, (self.course.escaped() >= share).any(0))

    @property
    def escaped_peak(self) -> float:
        return _finite(np.max, self.course.escaped())

    @property
    def escaped_end(self) -> float:
        return _finite(np.max, last_measured(self.course.escaped()))


def last_measured(values: np.ndarray) -> np.ndarray:
    """(layers, rows) -> (layers,) of the newest step in which layers were measured."""
    measured = np.flatnonzero(np.isfinite(values).any(0)) if values.size else []
    return values[:, measured[-1]] if len(measured) else values[:, -1:].reshape(-1)


def judge(courses: dict[str, list[Course]]) -> dict[str, list[Finding]]:
    """What became of each arm, seed by seed. Its last fifth is measured between BLIND and CONTROL at the same steps;
    where they are absent, between the first losses and the lowest there."""
    return {name: [_judge(course, courses) for course in found] for name, found in courses.items()}


def _judge(course: Course, courses: dict[str, list[Course]]) -> Finding:
    columns, last_step = course.columns, course.steps[-1]
    window = (0.8 * last_step, last_step)
    last, first = _level(course, window), float(columns["loss"][0])
    ends = {name: _finite(np.mean, np.array([_level(c, window) for c in found])) for name, found in courses.items()}
    top = ends.get(BLIND, first)
    goal = ends.get(CONTROL, _finite(np.min, np.array(list(ends.values()))))
    learned = (top - last) / (top - goal) if top - goal > PROGRESS * top else math.nan
    broken = ~np.isfinite(columns["loss"]) | ~np.isfinite(columns["grad_norm"])
    silent = columns["stem_grad"] == 0
    lost = (course.escaped() >= LOST).any(0) if course.meta["layers"] else np.zeros(len(course.steps), bool)
    gone = silent[-1] or _lost_now(course)
    if broken[course.steps >= window[0]].mean() >= 0.5:
        state = DIVERGED if not gone else ESCAPED
        return Finding(course, state, _since(course, broken | silent | lost), first, last, learned)
    if gone:
        return Finding(course, ESCAPED, _since(course, silent | lost), first, last, learned)
    state = UNCLEAR if math.isnan(learned) else TRAINS if learned >= LEARNED else STALLED
    return Finding(course, state, math.nan, first, last, learned)


def _level(course: Course, window: tuple[float, float]) -> float:
    """Mean loss of the logged steps in a window."""
    inside = (course.steps >= window[0]) & (course.steps <= window[1])
    return _finite(np.mean, course.columns["loss"][inside])


def _lost_now(course: Course) -> bool:
    shares = last_measured(course.escaped())
    return bool(len(shares) and np.nanmax(np.nan_to_num(shares)) >= LOST)


def _since(course: Course, bad: np.ndarray) -> float:
    """First step after the last that was good."""
    good = np.flatnonzero(~bad)
    if len(good) == 0:
        return float(course.steps[0])
    return float(course.steps[min(good[-1] + 1, len(bad) - 1)])


def _first(course: Course, condition: np.ndarray) -> float:
    at = np.flatnonzero(condition)
    return float(course.steps[at[0]]) if len(at) else math.nan


def _finite(reduce: Callable, values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(reduce(values)) if values.size else math.nan
