"""The one plain sentence of a comparison. The rule is explained in docs/compare.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

from comparison.intervals import Difference

POINTS_PER_DOUBLING = 3.0
"""Points of mAP50-95 that twice the time must bring. What the next larger plain model brings on COCO for each doubling
of its operations is 5.0 (n to s), 5.1 (s to m), 3.1 (m to l), 1.9 (l to x): whoever pays more for a point should
rather take the next size."""


@dataclass(frozen=True)
class Verdict:
    """``kind``: worth, dear, none, loses or unknown; ``text``: the sentence."""

    kind: str
    text: str


def judge(
    candidate: str,
    baseline: str,
    gain: Difference,
    train_ratio: float,
    inference_ratio: float,
    points_per_doubling: float = POINTS_PER_DOUBLING,
) -> Verdict:
    """Whether to take ``candidate`` instead of ``baseline``.

    ``gain``: difference of mAP50-95 in points (100 x AP). Ratios: the candidate's time by the baseline's. A gain counts
    when its whole interval lies above 0, and is worth it when it is at least ``points_per_doubling`` for each doubling
    of the larger of the two times.
    """
    if gain.half is None:
        return Verdict(
            "unknown",
            f"{candidate} has {gain.mean:+.1f} mAP50-95 against {baseline}, from too few trainings to tell from luck: "
            f"use --seeds 3 or more",
        )
    amount = f"{abs(gain.mean):.1f} +- {gain.half:.1f} mAP50-95"
    if gain.mean + gain.half < 0:
        return Verdict("loses", f"{candidate} loses {amount} against {baseline}: keep {baseline}")
    if gain.mean - gain.half <= 0:
        measured = f"{gain.mean:+.1f} +- {gain.half:.1f} mAP50-95 for {candidate}"
        return Verdict("none", f"no measurable gain ({measured}): keep {baseline}")
    ratio = max(train_ratio, inference_ratio)
    times = f"{train_ratio:.2g}x the training time and {inference_ratio:.2g}x the inference time"
    said = f"{candidate} gains {amount} over {baseline} for {times}"
    asked = points_asked(ratio, points_per_doubling)
    if gain.mean >= asked:
        return Verdict("worth", f"{said}: worth it")
    return Verdict("dear", f"{said}: too dear ({asked:.1f} points would pay for it), keep {baseline}")


def points_asked(ratio: float, points_per_doubling: float = POINTS_PER_DOUBLING) -> float:
    """Points of mAP50-95 that pay for ``ratio`` times the time; 0 for what is no slower."""
    return points_per_doubling * math.log2(ratio) if ratio > 1 else 0.0
