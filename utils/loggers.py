"""What a run writes down while it learns: results.csv and TensorBoard's event file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from utils.console import LOGGER
from utils.files import atomic_write

COLUMNS = (
    "train/box_loss",
    "train/obj_loss",
    "train/cls_loss",
    "metrics/precision",
    "metrics/recall",
    "metrics/mAP_0.5",
    "metrics/mAP_0.5:0.95",
    "val/box_loss",
    "val/obj_loss",
    "val/cls_loss",
    "x/lr0",
    "x/lr1",
    "x/lr2",
)
"""results.csv's columns after ``epoch``; x/lr0 is the bias group, lr1 the decayed weights, lr2 the norm weights."""


def results_header() -> str:
    """The first line: names right-aligned to 20 characters, comma between, as users' scripts expect."""
    return ",".join(f"{name:>20}" for name in ("epoch", *COLUMNS)) + "\n"


def results_row(epoch: int, values: Mapping[str, float]) -> str:
    """One line of results.csv with five significant digits."""
    return ",".join([f"{epoch:>20}", *(f"{values[name]:20.5g}" for name in COLUMNS)]) + "\n"


def read_results(path: Path) -> dict[str, list[float]]:
    """results.csv as {column name without blanks: values}; empty when there is no file."""
    if not path.is_file():
        return {}
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8")), skipinitialspace=True))
    names = [name.strip() for name in rows[0]]
    return {name: [float(row[i]) for row in rows[1:] if len(row) == len(names)] for i, name in enumerate(names)}


class RunLogger:
    """Writes one row an epoch to results.csv and, where tensorboard is installed, scalars and pictures for it.

    ``first_epoch`` > 0 (a resumed run) cuts results.csv back to the rows before it, so that no epoch appears twice.
    Only rank 0 makes one.
    """

    def __init__(self, run_dir: Path, first_epoch: int = 0) -> None:
        self.csv = run_dir / "results.csv"
        kept = []
        if first_epoch and self.csv.is_file():
            lines = self.csv.read_text(encoding="utf-8").splitlines(keepends=True)[1:]
            kept = [line for line in lines if line.endswith("\n") and int(line.split(",", 1)[0]) < first_epoch]
        atomic_write(self.csv, results_header() + "".join(kept))
        self._writer = _tensorboard_writer(run_dir)

    def epoch(self, epoch: int, values: Mapping[str, float], extra: Mapping[str, float] | None = None) -> None:
        """Append ``values`` (every name of COLUMNS) for one epoch; ``extra`` scalars go to TensorBoard alone."""
        with self.csv.open("a", encoding="utf-8") as file:
            file.write(results_row(epoch, values))
        if self._writer:
            for name, value in {**values, **(extra or {})}.items():
                self._writer.add_scalar(name, value, epoch)

    def image(self, name: str, picture: np.ndarray, step: int = 0) -> None:
        """Show a uint8 (H, W, 3) RGB picture in TensorBoard."""
        if self._writer:
            self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer:
            self._writer.close()


def _tensorboard_writer(run_dir: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        LOGGER.info("TensorBoard: not installed (pip install tensorboard); results.csv is written all the same")
        return None
    LOGGER.info(f"TensorBoard: start with 'tensorboard --logdir {run_dir.parent}', view at http://localhost:6006/")
    return SummaryWriter(str(run_dir))
