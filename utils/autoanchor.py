"""AutoAnchor: do the anchors fit the labels, and if not, which would? k-means, then a small evolution.

Works on arrays of widths and heights in pixels; knows nothing of models or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GOOD_RECALL = 0.98
_TINY = 3.0  # pixels: worth a warning
_SMALLEST = 2.0  # pixels: smaller labels are not clustered, smaller anchors not made
_MOST_LABELS = 10_000  # enough to place a dozen anchors; the evolution looks at all of them in every generation
_RESTARTS = 30
_STARTS = 4  # of the clusterings, the best are evolved a little, and the best of those in full


@dataclass(frozen=True)
class AnchorFit:
    """How anchors suit labels. ``bpr``: best possible recall, the share of labels that at least one anchor fits;
    ``aat``: anchors above threshold, fitting anchors per label; ``fitness``: mean closeness of the best anchor, 0 for
    labels that none fits; the rest are mean closenesses: of all pairs, of the best anchors, of the fitting pairs."""

    bpr: float
    aat: float
    fitness: float
    mean_all: float
    mean_best: float
    mean_fitting: float


@dataclass(frozen=True)
class AnchorReport:
    """Outcome of :func:`check_anchors`. ``anchors``: (nl, A, 2) float64 pixels, new ones or those given."""

    anchors: np.ndarray
    changed: bool
    bpr_before: float
    bpr_after: float
    text: str


def anchor_fit(label_wh: np.ndarray, anchors: np.ndarray, anchor_t: float) -> AnchorFit:
    """Measure anchors (..., 2) against labels (n, 2), both in pixels, n > 0.

    The closeness of a pair is the smaller of the two sides' ratios, taken below 1; the pair fits when it exceeds
    1/anchor_t, the condition by which the loss matches targets to anchors.
    """
    closeness = _closeness(label_wh, anchors)
    fits = closeness > 1 / anchor_t
    best = closeness.max(1)
    found = best > 1 / anchor_t
    return AnchorFit(
        bpr=float(found.mean()),
        aat=float(fits.sum(1).mean()),
        fitness=_fitness(label_wh, anchors, anchor_t),
        mean_all=float(closeness.mean()),
        mean_best=float(best.mean()),
        mean_fitting=float(closeness[fits].mean()) if fits.any() else 0.0,
    )


def check_anchors(
    label_wh: np.ndarray,
    anchors: np.ndarray,
    strides: np.ndarray,
    anchor_t: float,
    imgsz: int,
    rng: np.random.Generator,
    generations: int = 1000,
) -> AnchorReport:
    """Keep anchors that fit at least 98 % of the labels; otherwise look for better ones and keep the better set.

    label_wh: (n, 2) pixels of labels in images scaled to ``imgsz``. anchors: (nl, A, 2) pixels, strides: (nl,).
    anchor_t: largest accepted side ratio. rng decides everything random. The recall is measured on labels scaled by
    0.9 to 1.1 at random, as augmentation will do. New anchors go to the levels by size: small ones to small strides.
    """
    anchors, strides = np.asarray(anchors, float), np.asarray(strides, float)
    label_wh = np.asarray(label_wh, float).reshape(-1, 2)
    label_wh = label_wh[(label_wh > 0).all(1) & np.isfinite(label_wh).all(1)]
    if len(label_wh) == 0:
        return AnchorReport(anchors, False, 0.0, 0.0, "AutoAnchor: no labels to measure the anchors on; they stay")
    jittered = label_wh * rng.uniform(0.9, 1.1, (len(label_wh), 1))
    before = anchor_fit(jittered, anchors, anchor_t)
    text = f"AutoAnchor: {before.aat:.2f} anchors/target, {before.bpr:.3f} Best Possible Recall (BPR). "
    if before.bpr > GOOD_RECALL:
        text += "Current anchors are a good fit to dataset"
        return AnchorReport(anchors, False, before.bpr, before.bpr, text)
    text += "Anchors are a poor fit to dataset, "
    tiny = int((label_wh < _TINY).any(1).sum())
    hint = f"; {tiny} of {len(label_wh)} labels are under {_TINY:g} pixels: a larger --imgsz helps more" if tiny else ""
    count = anchors.shape[0] * anchors.shape[1]
    found = find_anchors(label_wh, count, imgsz, anchor_t, rng, generations)
    after = anchor_fit(jittered, found, anchor_t)
    if after.bpr <= before.bpr:
        text += f"but no better ones were found (BPR {after.bpr:.3f}); keeping them{hint}"
        return AnchorReport(anchors, False, before.bpr, before.bpr, text)
    text += f"replaced by better ones: BPR {after.bpr:.3f}, {after.aat:.2f} anchors/target{hint}. "
    text += f"To start with these, put them into the model's YAML: {format_anchors(found)}"
    return AnchorReport(by_stride(found, strides), True, before.bpr, after.bpr, text)


def find_anchors(
    label_wh: np.ndarray, count: int, imgsz: int, anchor_t: float, rng: np.random.Generator, generations: int = 1000
) -> np.ndarray:
    """(count, 2) anchors in pixels, sorted by area, for labels (n, 2): k-means on sizes, then evolution.

    With fewer labels than anchors, or clusters that run empty, the evolution starts from random sizes instead.
    """
    labels = label_wh[(label_wh >= _SMALLEST).any(1)]
    if len(labels) > _MOST_LABELS:
        labels = labels[rng.choice(len(labels), _MOST_LABELS, replace=False)]
    starts = _clusterings(labels, count, anchor_t, rng)
    if not starts:
        starts = [np.sort(rng.uniform(_SMALLEST, imgsz, count * 2)).reshape(count, 2)]
    if len(labels):
        tried = [_evolve(start, labels, anchor_t, rng, generations // 4) for start in starts]
        best = max(tried, key=lambda anchors: _fitness(labels, anchors, anchor_t))
        starts = [_evolve(best, labels, anchor_t, rng, generations)]
    return starts[0][np.argsort(starts[0].prod(1), kind="stable")]


def by_stride(anchors: np.ndarray, strides: np.ndarray) -> np.ndarray:
    """Sorted anchors (nl*A, 2) dealt out to the levels (nl, A, 2), small ones to small strides."""
    levels = anchors.reshape(len(strides), -1, 2)
    dealt = np.empty_like(levels)
    dealt[np.argsort(strides, kind="stable")] = levels
    return dealt


def format_anchors(anchors: np.ndarray) -> str:
    """``10,13, 16,30, ...`` as model YAML files write them."""
    return ", ".join(f"{w:.0f},{h:.0f}" for w, h in anchors.reshape(-1, 2))


def _closeness(label_wh: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """(n, anchors) in 0..1."""
    with np.errstate(divide="ignore"):  # anchors that hold the place of those to come are 0, as close as nothing
        ratio = label_wh[:, None] / anchors.reshape(1, -1, 2)
        return np.minimum(ratio, 1 / ratio).min(2)


def _fitness(label_wh: np.ndarray, anchors: np.ndarray, anchor_t: float) -> float:
    best = _closeness(label_wh, anchors).max(1)
    return float((best * (best > 1 / anchor_t)).mean())


def _clusterings(labels: np.ndarray, count: int, anchor_t: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Up to four sets of (count, 2) k-means centres of the sizes divided by their spread, the fittest of 30.

    Empty when there are fewer labels than centres, or when clusters run empty every time.
    """
    from scipy.cluster.vq import kmeans

    if len(labels) < count:
        return []
    spread = labels.std(0)
    spread[spread == 0] = 1.0
    found = []
    for _ in range(_RESTARTS):
        # starting points are drawn here: scipy has renamed its argument for the random source
        points = labels[rng.choice(len(labels), count, replace=False)] / spread
        centres, _ = kmeans(labels / spread, points)
        if len(centres) == count:
            found.append(centres * spread)
    return sorted(found, key=lambda anchors: -_fitness(labels, anchors, anchor_t))[:_STARTS]


def _evolve(
    anchors: np.ndarray, labels: np.ndarray, anchor_t: float, rng: np.random.Generator, generations: int
) -> np.ndarray:
    """Random changes, of nearly all sides and of a few in turn, each kept when the fitness grows."""
    best = _fitness(labels, anchors, anchor_t)
    for generation in range(generations):
        changed = rng.random(anchors.shape) < (0.9, 0.2)[generation % 2]
        factor = 1 + changed * rng.random() * rng.standard_normal(anchors.shape) * 0.2
        candidate = np.maximum(anchors * factor.clip(0.3, 3.0), _SMALLEST)
        score = _fitness(labels, candidate, anchor_t)
        if score > best:
            anchors, best = candidate, score
    return anchors
