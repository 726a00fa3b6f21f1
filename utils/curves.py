"""Diagrams with matplotlib: curves of one evaluation, the course of a training, statistics of labels.

Figures are objects drawn by the Agg canvas: no pyplot, no global state, no display needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from utils.errors import ResourceError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LEGEND = 20
"""With more classes than this, curves of single classes are thin, grey and unnamed."""


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (9, 6)) -> tuple[Figure, np.ndarray]:
    """A figure of ``size`` inches and its axes (rows x columns,), flat."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="tight")
    FigureCanvasAgg(figure)
    return figure, np.atleast_1d(figure.subplots(rows, columns)).reshape(-1)


def prepare_drawing() -> None:
    """Have the first figure drawn, an empty one: it takes half a second, others a fifth of one."""
    figure, _ = new_figure()
    figure.canvas.draw()


def save_figure(figure: Figure, file: str | Path, dpi: int = 200) -> None:
    """Write a figure in the format of the suffix, a picture's. Raises ResourceError when the disk refuses."""
    # not by figure.savefig: it goes through the figure twice, and its encoder needs three times as long
    figure.set_dpi(dpi)
    figure.canvas.draw()
    pixels = cv2.cvtColor(np.asarray(figure.canvas.buffer_rgba()), cv2.COLOR_RGBA2BGR)
    try:
        Path(file).write_bytes(cv2.imencode(Path(file).suffix, pixels)[1])
    except OSError as error:
        raise ResourceError(f"{file}: the picture cannot be written ({error.strerror or error})") from None


MAX_SHOWN = 40
"""Letters of a class name in a diagram: a longer one would leave no room for the curves."""


def _plain(name: str) -> str:
    """A class name as matplotlib shows it unchanged: ``$`` would start a formula, a leading ``_`` hide it."""
    name = name if len(name) <= MAX_SHOWN else f"{name[:MAX_SHOWN]}..."
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def plot_pr_curve(
    axis: np.ndarray, precision: np.ndarray, ap50: np.ndarray, names: Sequence[str], file: str | Path
) -> None:
    """Precision over recall at IoU 0.5: ``axis`` (k,), ``precision`` (c, k), ``ap50`` (c,), one name a class."""
    figure, (ax,) = new_figure()
    _class_lines(ax, axis, precision, [f"{_plain(name)} {ap:.3f}" for name, ap in zip(names, ap50)])
    if len(precision):
        label = f"all classes {ap50.mean():.3f} mAP@0.5"
        ax.plot(axis, precision.mean(0), linewidth=3, color="blue", label=label)
    _finish(ax, "Recall", "Precision", "Precision-Recall Curve")
    save_figure(figure, file)


def plot_confidence_curve(
    axis: np.ndarray, values: np.ndarray, names: Sequence[str], file: str | Path, ylabel: str
) -> None:
    """A score over confidence: ``axis`` (k,), ``values`` (c, k); ``ylabel`` is F1, Precision or Recall."""
    figure, (ax,) = new_figure()
    _class_lines(ax, axis, values, [_plain(name) for name in names])
    if len(values):
        width = max(1, len(axis) // 10) // 2 * 2 + 1  # a moving average finds the same best point as the metrics
        padded = np.pad(values.mean(0), width // 2, mode="edge")
        mean = np.convolve(padded, np.ones(width) / width, mode="valid")
        label = f"all classes {mean.max():.2f} at {axis[mean.argmax()]:.3f}"
        ax.plot(axis, mean, linewidth=3, color="blue", label=label)
    _finish(ax, "Confidence", ylabel, f"{ylabel}-Confidence Curve")
    save_figure(figure, file)


def _class_lines(ax: Axes, axis: np.ndarray, values: np.ndarray, labels: Sequence[str]) -> None:
    if 0 < len(values) <= MAX_LEGEND:
        for row, label in zip(values, labels):
            ax.plot(axis, row, linewidth=1, label=label)
    elif len(values):
        ax.plot(axis, values.T, linewidth=1, color="grey", alpha=0.5)


def _finish(ax: Axes, xlabel: str, ylabel: str, title: str) -> None:
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title, xlim=(0, 1), ylim=(0, 1))
    if ax.has_data():
        ax.legend(bbox_to_anchor=(1.02, 1), loc="upper left")


def plot_confusion_matrix(counts: np.ndarray, names: Sequence[str], file: str | Path) -> None:
    """``counts`` (nc+1, nc+1), rows predicted, columns true, background last; each column shown as shares of itself.

    Shares below 0.005 stay blank; numbers are written up to 29 classes.
    """
    shares = counts / np.maximum(counts.sum(0, keepdims=True), 1e-9)
    shares = np.where(shares < 0.005, np.nan, shares)
    ticks = [*map(_plain, names), "background"]
    figure, (ax,) = new_figure(size=(12, 9))
    edges = np.arange(len(ticks) + 1) - 0.5
    squares = ax.pcolormesh(edges, edges, shares, cmap="Blues", vmin=0, vmax=1)  # imshow enlarges it pixel by pixel
    figure.colorbar(squares, ax=ax)
    ax.set(xlabel="True", ylabel="Predicted", title="Confusion Matrix", aspect="equal", ylim=edges[[-1, 0]])
    if len(ticks) < 100:
        ax.set_xticks(range(len(ticks)), ticks, rotation=90)
        ax.set_yticks(range(len(ticks)), ticks)
    if len(names) < 30:
        size = 12 if len(names) < 12 else 7
        for row, column in zip(*np.nonzero(~np.isnan(shares))):
            share = shares[row, column]
            ink = "white" if share > 0.5 else "black"
            ax.text(column, row, f"{share:.2f}", ha="center", va="center", color=ink, fontsize=size)
    save_figure(figure, file, dpi=250)


RESULT_PANELS = (
    "train/box_loss",
    "train/obj_loss",
    "train/cls_loss",
    "metrics/precision",
    "metrics/recall",
    "val/box_loss",
    "val/obj_loss",
    "val/cls_loss",
    "metrics/mAP_0.5",
    "metrics/mAP_0.5:0.95",
)


def plot_results(results: Mapping[str, Sequence[float]], file: str | Path) -> None:
    """The course of a training in two rows of five panels. ``results``: columns of results.csv, ``epoch`` included;
    a dotted line shows the trend."""
    figure, axes = new_figure(2, 5, size=(14, 6))
    for ax, name in zip(axes, RESULT_PANELS):
        y = np.asarray(results.get(name, ()), float)
        x = np.asarray(results.get("epoch", ()), float)[: len(y)]
        ax.plot(x, y, marker=".", linewidth=2, markersize=6, label="results")
        if len(y) > 3:
            ax.plot(x, _trend(y), ":", linewidth=2, label="smooth")
        ax.set_title(name, fontsize=11)
    if axes[1].has_data():
        axes[1].legend()
    save_figure(figure, file)


def _trend(y: np.ndarray, sigma: float = 3.0) -> np.ndarray:
    """(k,) smoothed by a Gaussian of ``sigma`` epochs; gaps (NaN) and ends count less instead of being invented."""
    reach = np.arange(-round(4 * sigma), round(4 * sigma) + 1)
    kernel = np.exp(-0.5 * (reach / sigma) ** 2)
    known = np.isfinite(y)
    total = np.convolve(np.where(known, y, 0), kernel, mode="full")
    weight = np.convolve(known.astype(float), kernel, mode="full")
    middle = slice(len(reach) // 2, len(reach) // 2 + len(y))
    return total[middle] / np.maximum(weight[middle], 1e-12)


def plot_labels(labels: np.ndarray, names: Mapping[int, str], file: str | Path) -> None:
    """Statistics of ``labels`` (n, 5) class, cx, cy, w, h in 0..1: boxes a class, 1000 boxes about one centre, and
    where centres and sizes lie."""
    from matplotlib.collections import LineCollection

    labels = np.asarray(labels, np.float32).reshape(-1, 5)  # as they are kept: not copied
    figure, (bars, outlines, places, sizes) = new_figure(2, 2, size=(8, 8))
    counts = np.bincount(labels[:, 0].astype(int), minlength=len(names))
    bars.bar(range(len(counts)), counts)
    bars.set_ylabel("instances")
    if len(names) < 30:
        ticks = [_plain(names.get(i, str(i))) for i in range(len(counts))]
        bars.set_xticks(range(len(counts)), ticks, rotation=90, fontsize=9)
    else:
        bars.set_xlabel("classes")

    half = labels[:1000, 3:5] / 2
    signs = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)])
    outline = 0.5 + half[:, None, :] * signs
    colours = [f"C{int(c) % 10}" for c in labels[:1000, 0]]
    outlines.add_collection(LineCollection(outline, colors=colours, linewidths=0.5))
    outlines.set(xlim=(0, 1), ylim=(1, 0), aspect="equal", xticks=[], yticks=[])
    for ax, (x, y), (xlabel, ylabel) in ((places, (1, 2), ("x", "y")), (sizes, (3, 4), ("width", "height"))):
        ax.hist2d(labels[:, x], labels[:, y], bins=50, range=((0, 1), (0, 1)), cmap="Blues")
        ax.set(xlabel=xlabel, ylabel=ylabel)
    save_figure(figure, file)


def plot_study(rows: Mapping[str, np.ndarray], file: str | Path) -> None:
    """Speed against accuracy. ``rows``: of each model (s, 4): image size, mAP50, mAP50-95, ms an image (without
    pre-processing)."""
    figure, (accuracy, trade) = new_figure(1, 2, size=(12, 5))
    for name, data in rows.items():
        size, _, mean_ap, ms = np.asarray(data, float).T
        accuracy.plot(size, mean_ap, marker=".", label=_plain(name))
        trade.plot(ms, mean_ap, marker=".", label=_plain(name))
    accuracy.set(xlabel="image size (pixels)", ylabel="mAP50-95")
    trade.set(xlabel="inference and NMS (ms/image)", ylabel="mAP50-95")
    for ax in (accuracy, trade):
        ax.grid(alpha=0.3)
        ax.legend()
    save_figure(figure, file)
