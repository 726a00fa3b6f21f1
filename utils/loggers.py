"""What a run writes down while it learns: results.csv and TensorBoard's event file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

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
    """results.csv as {column name without blanks: values}; empty when there is no file. Rows that are not numbers, as
    many as there are columns, are left out."""
    lines = _lines(path)
    names = [name.strip() for name in lines[0].split(",")] if lines else []
    rows = [row for line in lines[1:] if len(row := _numbers(line)) == len(names)]
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)


def _numbers(line: str) -> list[float]:
    try:
        return [float(cell) for cell in line.split(",")]
    except ValueError:
        return []


OFFSET_COLUMNS = ("mean_offset", "median_offset", "p95_offset", "max_offset", "outside", "outside_at_rest", "mean_mask")
"""Lengths in pixels of the layer's input; shares of samples outside the image, now and with zero offsets; 0..1."""


class RunLogger:
    """Writes one row an epoch to results.csv and, where tensorboard is installed, scalars and pictures for it.

    A model with DCN layers also gets offsets.csv (:meth:`layers`).

    ``first_epoch`` > 0 (a resumed run) cuts both back to the rows before it, so that no epoch appears twice.
    Only rank 0 makes one.
    """

    def __init__(self, run_dir: Path, first_epoch: int = 0) -> None:
        self.csv = run_dir / "results.csv"
        kept = []
        if first_epoch:
            rows = [(line, _numbers(line)) for line in _lines(self.csv)[1:] if line.endswith("\n")]
            kept = [line for line, row in rows if len(row) == 1 + len(COLUMNS) and row[0] < first_epoch]
        atomic_write(self.csv, results_header() + "".join(kept))
        self.offsets = run_dir / "offsets.csv"
        self._cut_offsets(first_epoch)
        self._writer = _tensorboard_writer(run_dir)

    def _cut_offsets(self, first_epoch: int) -> None:
        """Leave the rows before ``first_epoch`` in offsets.csv; without any, no file."""
        header, *rows = _lines(self.offsets) or [""]
        kept = [row for row in rows if row.endswith("\n") and row.split(",")[0].isdigit()]
        kept = [row for row in kept if int(row.split(",")[0]) < first_epoch]
        if kept:
            atomic_write(self.offsets, header + "".join(kept))
        else:
            self.offsets.unlink(missing_ok=True)

    def epoch(self, epoch: int, values: Mapping[str, float], extra: Mapping[str, float] | None = None) -> None:
        """Append ``values`` (every name of COLUMNS) for one epoch; ``extra`` scalars go to TensorBoard alone."""
        with self.csv.open("a", encoding="utf-8") as file:
            file.write(results_row(epoch, values))
        if self._writer:
            for name, value in {**values, **(extra or {})}.items():
                self._writer.add_scalar(name, value, epoch)

    def layers(self, epoch: int, summary: Mapping[str, Mapping[str, float]], lengths: Mapping[str, Tensor]) -> None:
        """What the DCN layers of a model did in an epoch (utils.dcn_watch): a row a layer in offsets.csv; in
        TensorBoard each number, and a histogram of the ``lengths`` of offsets."""
        rows = []
        for layer, values in summary.items():
            median, high = torch.quantile(lengths[layer].nan_to_num(), torch.tensor([0.5, 0.95])).tolist()
            values = {**values, "median_offset": median, "p95_offset": high}
            rows.append(",".join([str(epoch), layer, *(f"{values[name]:.6g}" for name in OFFSET_COLUMNS)]) + "\n")
            if self._writer:
                for name, value in values.items():
                    self._writer.add_scalar(f"dcn/{layer}/{name}", value, epoch)
                self._writer.add_histogram(f"dcn/{layer}/offsets", lengths[layer].nan_to_num(), epoch)
        if rows:
            new = not self.offsets.is_file()
            with self.offsets.open("a", encoding="utf-8") as file:
                file.write((",".join(("epoch", "layer", *OFFSET_COLUMNS)) + "\n") * new + "".join(rows))

    def image(self, name: str, file: Path, size: tuple[int, int], step: int = 0) -> None:
        """Show a JPEG or PNG file of (height, width) in TensorBoard: its bytes as they are. To compress a picture anew,
        as add_image does, takes more than a second for one of a batch."""
        if self._writer:
            from tensorboard.compat.proto.summary_pb2 import Summary

            height, width = size
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file.read_bytes())
            self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

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
