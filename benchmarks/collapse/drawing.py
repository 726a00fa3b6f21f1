"""Pictures of the records: arms over each other, and the layers of one arm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.collapse.findings import Finding
from benchmarks.collapse.record import Course
from utils.curves import new_figure, save_figure

DPI = 90


def _worst(column: str) -> Callable[[Course], np.ndarray]:
    def largest(course: Course) -> np.ndarray:
        values = course.layers(column)
        return values.max(0) if len(values) else np.full(len(course.steps), np.nan)

    return largest


def _escaped(course: Course) -> np.ndarray:
    values = course.escaped()
    return values.max(0) if len(values) else np.full(len(course.steps), np.nan)


PANELS = (
    ("loss", lambda c: c.columns["loss"], "linear"),
    ("norm of all gradients, before clipping", lambda c: c.columns["grad_norm"], "log"),
    ("gradient at the stem", lambda c: c.columns["stem_grad"], "symlog"),
    ("share of samples that left the image, worst layer", _escaped, "linear"),
    ("mean |offset|, pixels of the layer's input, worst layer", _worst("off_mean"), "log"),
    ("loss scale", lambda c: c.columns["scale"], "log"),
)
LAYER_PANELS = (
    ("std of the output", "std", "log"),
    ("gradient of the weight", "grad_weight", "symlog"),
    ("gradient of the offset weights", "grad_offset_weight", "symlog"),
    ("share of samples outside the image", "dead", "linear"),
    ("mean |offset|, pixels of the layer's input", "off_mean", "log"),
    ("mean mask", "mask", "linear"),
)


def draw_arms(findings: dict[str, list[Finding]], names: Sequence[str], file: Path) -> bool:
    """The arms of ``names`` that were run (first seed), six quantities over the steps; False where none was."""
    shown = [name for name in names if name in findings]
    if not shown:
        return False
    figure, axes = new_figure(2, 3, (16, 8))
    for axis, (title, values, scale) in zip(axes, PANELS):
        for number, name in enumerate(shown):
            course = findings[name][0].course
            style = "-" if number < 10 else "--"
            _line(axis, course.steps, values(course), scale, f"{name}: {findings[name][0].state}", style)
        _finish(axis, title, scale)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8)
    figure.get_layout_engine().set(rect=(0, 0.02 + 0.022 * math.ceil(len(shown) / 4), 1, 1))  # room for it
    save_figure(figure, file, DPI)
    return True


def draw_layers(course: Course, file: Path) -> bool:
    """The DCN layers of one arm; False where it has none."""
    names = list(course.meta["layers"])
    if not names:
        return False
    figure, axes = new_figure(2, 3, (16, 8))
    for axis, (title, column, scale) in zip(axes, LAYER_PANELS):
        for name, values in zip(names, course.layers(column)):
            _line(axis, course.steps, values, scale, f"layer {name}", "-")
        _finish(axis, title, scale)
    if len(names) <= 10:
        axes[0].legend(fontsize=7)
    figure.suptitle(course.name)
    save_figure(figure, file, DPI)
    return True


def _line(axis, steps: np.ndarray, values: np.ndarray, scale: str, label: str, style: str) -> None:
    drawn = np.isfinite(values) & ((values > 0) | (scale != "log"))
    axis.plot(steps[drawn], np.minimum(values[drawn], 1e30), style, linewidth=1.2, label=label)


def _finish(axis, title: str, scale: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("iteration", fontsize=8)
    if scale == "symlog":
        axis.set_yscale("symlog", linthresh=1e-3)
    elif scale == "log" and any(len(line.get_xdata()) for line in axis.get_lines()):
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
