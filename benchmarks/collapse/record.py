"""An arm's numbers by step: a CSV file below 100 kB with its settings in the first line."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import DataError
from utils.files import atomic_write

STEP = (
    "step", "loss", "box", "obj", "cls", "grad_norm", "clip_factor", "offset_norm", "offset_share", "stem_grad",
    "scale", "skipped", "lr", "lr_bias", "lr_offset_weight", "lr_offset_bias",
)  # fmt: skip
"""Columns of a whole step. Losses are means since the logged step before. Norms are of gradients, unscaled and not yet
clipped; offset_share is offset_norm / grad_norm; skipped counts the optimizer steps left out so far."""
LAYER = (
    "std", "max", "grad_weight", "grad_offset_weight", "grad_offset_bias", "off_mean", "off_max", "dy", "dx",
    "positive", "shift", "dead", "mask", "before_norm",
)  # fmt: skip
"""Columns of a DCN layer, named LAYER:COLUMN. std, max: of its output. off_*: length of offsets, pixels of its input;
dy, dx: means with sign; positive: share above 0; shift: rms over taps and axes of what the offsets of all pixels have
in common. dead: share of samples outside the image. mask: mean. before_norm: std of what the next BatchNorm sees."""


@dataclass(frozen=True)
class Course:
    """An arm's record. ``meta``: settings; ``meta["layers"]`` {name: {height, width, rest}}, rest being the share of
    samples outside the image with zero offsets. ``columns``: float64 (rows,) each, NaN where not measured."""

    meta: dict[str, Any]
    columns: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        return self.meta["arm"]

    @property
    def steps(self) -> np.ndarray:
        return self.columns["step"]

    def layers(self, column: str) -> np.ndarray:
        """(layers, rows) of one of LAYER's columns."""
        names = self.meta["layers"]
        if not names:
            return np.full((0, len(self.steps)), math.nan)
        return np.stack([self.columns[f"{name}:{column}"] for name in names])

    def escaped(self) -> np.ndarray:
        """(layers, rows): the share of samples that left the image, of those that were inside with zero offsets."""
        rest = np.array([[layer["rest"]] for layer in self.meta["layers"].values()]).reshape(-1, 1)
        return np.clip((self.layers("dead") - rest) / np.maximum(1 - rest, 1e-9), 0, 1)


def file_for(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"{arm}-s{seed}.csv"


def save(file: Path, meta: dict[str, Any], header: list[str], rows: list[list[float]]) -> None:
    """Write a record whole or not at all; numbers have four digits, those not measured are empty."""
    lines = ["# " + json.dumps(meta), ",".join(header)]
    lines += [",".join("" if math.isnan(v) and i >= len(STEP) else f"{v:.4g}" for i, v in enumerate(r)) for r in rows]
    atomic_write(file, "\n".join(lines) + "\n")


def load(file: Path) -> Course:
    """Read what :func:`save` wrote. DataError naming the file when it is something else."""
    try:
        first, *rest = file.read_text(encoding="utf-8").splitlines()
        meta = json.loads(first.removeprefix("# "))
        header, *rows = csv.reader(rest)
        numbers = [[float(cell) if cell else math.nan for cell in row] for row in rows]
        values = np.array(numbers).reshape(-1, len(header))
        if header[: len(STEP)] != list(STEP) or "layers" not in meta:
            raise ValueError
    except (OSError, ValueError, TypeError):
        raise DataError(f"{file}: is no record of benchmarks.collapse; remove it or run its arm again") from None
    return Course(meta, dict(zip(header, values.T)))


def load_folder(folder: Path) -> dict[str, list[Course]]:
    """The records of a folder by arm, seeds in order. DataError when there are none."""
    found: dict[str, list[Course]] = {}
    for file in sorted(folder.glob("*.csv")):
        course = load(file)
        if len(course.steps):
            found.setdefault(course.name, []).append(course)
    if not found:
        raise DataError(f"--report {folder}: no records in it; run the arms first")
    return found
