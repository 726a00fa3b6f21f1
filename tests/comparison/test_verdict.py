"""Intervals against closed forms, and the sentence on made-up numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from comparison.intervals import Difference, central_half, difference, mean_interval, t_quantile, welch_half
from comparison.verdict import judge, points_asked


@pytest.mark.parametrize("p", [0.5, 0.9, 0.975, 0.995])
def test_t_quantile_in_closed_form(p: float) -> None:
    """df 1 is Cauchy's distribution; 2 and 4 have algebraic inverses; many degrees of freedom are the normal one."""
    a = 4 * p * (1 - p)
    assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-5, abs=1e-9)
    assert t_quantile(p, 2) == pytest.approx(2 * (p - 0.5) * math.sqrt(2 / a), rel=1e-5, abs=1e-9)
    four = 2 * math.sqrt(max(math.cos(math.acos(math.sqrt(a)) / 3) / math.sqrt(a) - 1, 0))
    assert t_quantile(p, 4) == pytest.approx(four, rel=1e-5, abs=1e-6)
    normal = {0.5: 0.0, 0.9: 1.2815516, 0.975: 1.9599640, 0.995: 2.5758293}[p]
    assert t_quantile(p, 1e6) == pytest.approx(normal, rel=1e-4, abs=1e-6)


def test_t_quantile_between_whole_degrees_lies_between() -> None:
    values = [t_quantile(0.975, df) for df in (2, 2.5, 3, 29.9, 30, 30.1)]
    assert values == sorted(values, reverse=True)
    assert values[4] == pytest.approx(2.042272, rel=1e-5)
    with pytest.raises(ValueError):
        t_quantile(0.975, 0.5)


def test_mean_interval() -> None:
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2 and interval.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert mean_interval([1.5]).half is None
    assert math.isnan(mean_interval([]).mean)
    assert mean_interval([2.0, 2.0]).half == 0


def test_the_t_interval_holds_its_promise() -> None:
    """Of many triples of normal numbers 95 % have the true mean in their interval."""
    rng = np.random.default_rng(0)
    held = [abs(i.mean) <= i.half for i in (mean_interval(row) for row in rng.normal(0, 1, (400, 3)))]
    assert 0.92 <= np.mean(held) <= 0.98


def test_welch() -> None:
    """Equal spreads and sizes: the pooled t of 2n - 2 degrees of freedom."""
    a, b = [1.0, 2.0, 3.0], [11.0, 12.0, 13.0]
    assert welch_half(a, b) == pytest.approx(2.776445 * math.sqrt(2 / 3), rel=1e-5)
    assert welch_half(a, [5.0, 5.0, 5.0]) == pytest.approx(mean_interval(a).half)  # one spread alone: its own degrees
    assert welch_half([1.0], b) is None and welch_half([1.0, 1.0], [2.0, 2.0]) == 0


def test_both_sources_of_chance_add_up_as_squares() -> None:
    resampled = np.linspace(-1, 1, 2001)
    assert central_half(np.append(resampled, np.nan)) == pytest.approx(0.95)
    both = difference([1.0, 2.0, 3.0], [0.0, 1.0, 2.0], resampled)
    assert both.mean == 1 and both.half == pytest.approx(math.hypot(welch_half([1, 2, 3], [0, 1, 2]), 0.95))
    single = difference([1.0], [0.0, 1.0], resampled)
    assert single.half is None and single.seeds_half is None and single.images_half == pytest.approx(0.95)


CASES = [
    (1.2, 0.5, 1.3, 1.1, "worth", "dcn gains 1.2 +- 0.5 mAP50-95 over plain for 1.3x the training time and 1.1x"),
    (1.2, 0.5, 1.3, 2.0, "dear", "too dear (3.0 points would pay for it), keep plain"),
    (1.2, 0.5, 0.9, 0.8, "worth", "worth it"),
    (0.5, 0.5, 1.0, 1.0, "none", "no measurable gain (+0.5 +- 0.5 mAP50-95 for dcn): keep plain"),
    (-0.4, 0.5, 1.0, 1.0, "none", "no measurable gain (-0.4 +- 0.5 mAP50-95 for dcn): keep plain"),
    (-1.2, 0.5, 1.0, 1.0, "loses", "dcn loses 1.2 +- 0.5 mAP50-95 against plain: keep plain"),
    (5.0, None, 1.0, 1.0, "unknown", "from too few trainings to tell from luck: use --seeds 3 or more"),
]


@pytest.mark.parametrize(("mean", "half", "train", "inference", "kind", "words"), CASES)
def test_the_sentence(mean, half, train, inference, kind, words) -> None:
    verdict = judge("dcn", "plain", Difference(mean, half, half, 0.1), train, inference)
    assert verdict.kind == kind and words in verdict.text


def test_the_price_is_the_users_to_set() -> None:
    assert points_asked(2, 3) == 3 and points_asked(4, 3) == 6 and points_asked(0.5, 3) == 0
    gain = Difference(1.2, 0.5, 0.4, 0.3)
    assert judge("dcn", "plain", gain, 2, 1, points_per_doubling=1).kind == "worth"
    assert judge("dcn", "plain", gain, 2, 1, points_per_doubling=2).kind == "dear"
