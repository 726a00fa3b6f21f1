"""The numbers of a comparison, from predictions to tables: what the reports show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from comparison.groups import Bins, ratio_bins, size_bins
from comparison.intervals import Difference, Interval, difference, mean_interval
from comparison.matching import Matched, Predictions, Scope, everything, in_bin, match
from comparison.predictions import aligned
from comparison.resampling import average_precisions, draw_weights, mean_ap

BIN_RESAMPLES = 200
"""Resamples for the rows by size and shape, whose intervals need not be as fine: a tenth of the time."""

POINTS = 100
"""Tables show AP in points: 100 x AP."""


@dataclass(frozen=True)
class Score:
    """A model in one row, in points. ``map50`` and ``map`` over seeds; ``by_seed`` (map50, map) of each;
    ``gain``: difference of mAP50-95 to the first model, None for that one and where there is nothing to compare."""

    map50: Interval
    map: Interval
    by_seed: tuple[tuple[float, float], ...]
    gain: Difference | None = None


@dataclass(frozen=True)
class Row:
    """A part of the labels. ``kind``: all, class, size or aspect ratio; ``labels``: how many; ``scores`` by model."""

    kind: str
    name: str
    labels: int
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class SplitFindings:
    """All rows of one split."""

    split: str
    images: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    sizes: Bins

    @property
    def overall(self) -> Row:
        return self.rows[0]

    def of_kind(self, kind: str) -> list[Row]:
        """Its rows of one kind."""
        return [row for row in self.rows if row.kind == kind]


def analyse(
    split: str,
    predictions: Mapping[str, Sequence[Predictions]],
    names: Mapping[int, str],
    resamples: int = 1000,
    bins: Bins | None = None,
) -> SplitFindings:
    """Scores of every model over all labels, by class, by size and by aspect ratio.

    ``predictions``: of each model, those of its seeds, on the same images; the first model is what the others are
    compared with. ``bins``: of sizes, by default chosen from these labels. The resamples are the same for all models
    and in every call.
    """
    first = next(iter(predictions.values()))[0]
    matched = {model: [match(aligned(p, first)) for p in runs] for model, runs in predictions.items()}
    some = next(iter(matched.values()))[0]
    sizes, shapes = bins or size_bins(some.label_boxes), ratio_bins()
    weights, nc = draw_weights(len(first.paths), resamples), len(names)
    rows = _whole_rows(matched, weights, names)
    for kind in (sizes, shapes):
        for number, name in enumerate(kind.names):
            aps = _all_aps(matched, lambda m, k=kind, n=number: in_bin(m, k, n), weights[:BIN_RESAMPLES], nc)
            count = int((kind.index(some.label_boxes) == number).sum())
            rows.append(Row(kind.kind, name, count, _scores(aps)))
    notes = (f"Size: {sizes.note}.", f"Aspect ratio: {shapes.note}.")
    return SplitFindings(split, len(first.paths), tuple(rows), notes, sizes)


Aps = dict[str, list[np.ndarray]]
"""By model, of each seed: AP (nc, 10, 1 + B), the split itself in the first column, then the resamples."""


def _all_aps(
    matched: Mapping[str, Sequence[Matched]], scope: Callable[[Matched], Scope], weights: np.ndarray, nc: int
) -> Aps:
    columns = np.concatenate((np.ones((1, weights.shape[1]), np.float32), weights))
    return {model: [average_precisions(m, scope(m), columns, nc) for m in runs] for model, runs in matched.items()}


def _whole_rows(matched: Mapping[str, Sequence[Matched]], weights: np.ndarray, names: Mapping[int, str]) -> list[Row]:
    """The row of all labels, then one for each class that has any."""
    aps = _all_aps(matched, everything, weights, len(names))
    labels = next(iter(matched.values()))[0].label_cls
    counts = np.bincount(labels, minlength=len(names))
    rows = [Row("all", "all", len(labels), _scores(aps))]
    for cls in np.flatnonzero(counts) if len(names) > 1 else ():
        own = {model: [ap[cls : cls + 1] for ap in runs] for model, runs in aps.items()}
        rows.append(Row("class", names[int(cls)], int(counts[cls]), _scores(own)))
    return rows


def _scores(aps: Aps) -> dict[str, Score]:
    scores: dict[str, Score] = {}
    base = None
    for model, runs in aps.items():
        map50 = [float(mean_ap(ap[:, :1, :1])[0]) * POINTS for ap in runs]
        resampled = np.stack([mean_ap(ap) for ap in runs]) * POINTS
        values, resampled = resampled[:, 0], resampled[:, 1:].mean(0)
        gain = None
        if base is None:
            base = values, resampled
        elif not np.isnan(values).any():
            gain = difference(values, base[0], resampled - base[1])
        by_seed = tuple(zip(map50, values.tolist()))
        scores[model] = Score(mean_interval(map50), mean_interval(values), by_seed, gain)
    return scores
