"""Anchor metrics against upstream's values, and the search: reaches its fitness, never makes things worse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from utils.autoanchor import anchor_fit, by_stride, check_anchors, find_anchors, format_anchors

REFERENCE = Path(__file__).parents[1] / "reference"
STORED = json.loads((REFERENCE / "anchors.json").read_text())
DEFAULT = np.array([10, 13, 16, 30, 33, 23, 30, 61, 62, 45, 59, 119, 116, 90, 156, 198, 373, 326], float).reshape(
    3, 3, 2
)
STRIDES = np.array([8, 16, 32])


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    with np.load(REFERENCE / "anchors.npz") as arrays:
        return arrays["wh_pixels"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_metrics_of_the_default_anchors(labels: np.ndarray) -> None:
    fit, stored = anchor_fit(labels, DEFAULT, STORED["thr"]), STORED["default_p5"]
    pairs = {
        "aat": fit.aat,
        "bpr": fit.bpr,
        "fitness": fit.fitness,
        "metric_all": fit.mean_all,
        "metric_best": fit.mean_best,
        "past_thr": fit.mean_fitting,
    }
    assert pairs == pytest.approx({key: stored[key] for key in pairs}, rel=1e-5)
    evolved, stored = np.array(STORED["kmeans9_gen1000_one_run"]["anchors"]), STORED["kmeans9_gen1000_one_run"]
    fit = anchor_fit(labels, evolved, STORED["thr"])
    assert (fit.bpr, fit.fitness) == pytest.approx((stored["bpr"], stored["fitness"]), rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_search_reaches_upstreams_fitness(labels: np.ndarray, seed: int) -> None:
    found = find_anchors(labels, 9, 640, STORED["thr"], rng(seed))
    assert anchor_fit(labels, found, STORED["thr"]).fitness >= min(STORED["fitness_over_5_seeds"])
    assert (np.diff(found.prod(1)) >= 0).all()
    assert np.array_equal(found, find_anchors(labels, 9, 640, STORED["thr"], rng(seed)))  # the generator decides all


def test_poor_anchors_are_replaced(labels: np.ndarray) -> None:
    report = check_anchors(labels, DEFAULT, STRIDES, 4.0, 640, rng(), generations=300)
    assert report.changed and report.anchors.shape == (3, 3, 2)
    assert report.bpr_before < 0.9 < report.bpr_after
    assert f"{report.bpr_before:.3f} Best Possible Recall (BPR). Anchors are a poor fit to dataset" in report.text
    assert format_anchors(report.anchors) in report.text
    assert "labels are under 3 pixels" in report.text


def test_good_anchors_stay() -> None:
    labels = np.repeat(DEFAULT.reshape(-1, 2), 5, 0)
    report = check_anchors(labels, DEFAULT, STRIDES, 4.0, 640, rng())
    assert not report.changed and np.array_equal(report.anchors, DEFAULT)
    assert "good fit" in report.text and report.bpr_before == report.bpr_after == 1.0


def test_hopeless_labels_leave_the_anchors_alone() -> None:
    slivers = np.array([[1.0, 600.0], [600.0, 1.0]] * 20)  # no anchor of at least 2 px fits within a factor of 1.5
    report = check_anchors(slivers, DEFAULT, STRIDES, 1.5, 640, rng(), generations=20)
    assert not report.changed and np.array_equal(report.anchors, DEFAULT)
    assert "no better ones were found" in report.text


@pytest.mark.parametrize(
    "labels",
    [
        np.zeros((0, 2)),
        np.array([[0.0, 5.0], [np.nan, 3.0]]),
        np.array([[500.0, 3.0]]),  # fewer labels than anchors
        np.full((50, 2), 400.0) * [1, 0.01],  # all alike: no spread, empty clusters
        np.full((50, 2), 1.0),  # all under the smallest size
    ],
)
def test_odd_data_sets_give_usable_anchors(labels: np.ndarray) -> None:
    report = check_anchors(labels, DEFAULT, STRIDES, 4.0, 640, rng(), generations=20)
    assert report.anchors.shape == (3, 3, 2)
    assert np.isfinite(report.anchors).all() and (report.anchors >= 2).all()
    assert report.bpr_after >= report.bpr_before


def test_small_anchors_go_to_small_strides_whatever_the_order() -> None:
    anchors = np.arange(1.0, 13.0).reshape(6, 2)
    assert by_stride(anchors, np.array([8, 16, 32]))[0, 0].tolist() == [1, 2]
    assert by_stride(anchors, np.array([32, 16, 8]))[2, 0].tolist() == [1, 2]
