"""A report on a data set before it is trained on: what is in it, what is wrong with it (train.py --check-data)."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from utils.config import DataConfig
from utils.console import encodable, plural, progress
from utils.errors import DataError
from utils.label_cache import scan_labels
from utils.label_index import LabelIndex
from utils.safe_names import printable

_PERCENTILES = (5, 25, 50, 75, 95)
_SMALL, _LARGE = 32, 96  # sides in pixels that part small, medium and large boxes, as COCO does
_MAX_LISTED = 20


def print_report(data: DataConfig, imgsz: int = 640) -> int:
    """Print the report on all splits of ``data``. Returns the exit status: 1 when there is a fault, else 0."""
    splits = {"train": data.train, "val": data.val, "test": data.test}
    text, faults = _report({split: sources for split, sources in splits.items() if sources}, data.names, imgsz)
    print(encodable(printable(text, keep="\n")))
    return int(faults > 0)


def dataset_report(splits: Mapping[str, Iterable[str | Path]], names: Mapping[int, str], imgsz: int = 640) -> str:
    """Describe the splits of a data set as text.

    ``splits``: sources by name, e.g. {"train": ..., "val": ...}; ``names``: class names; ``imgsz``: box sizes are
    given in pixels with the longest image side at this. Reads all images once, to find equal ones. A split that
    cannot be used is reported, not raised.
    """
    return _report(splits, names, imgsz)[0]


def _report(splits: Mapping[str, Iterable[str | Path]], names: Mapping[int, str], imgsz: int) -> tuple[str, int]:
    """The text and the number of faults."""
    lines: list[str] = []
    indexes: dict[str, LabelIndex] = {}
    faults = 0
    for split, sources in splits.items():
        lines.append(f"{split}:")
        try:
            indexes[split] = scan_labels(sources, len(names), split, show=False)
        except DataError as error:
            lines += [f"  cannot be used: {error}", ""]
            faults += 1
            continue
        faults += len(indexes[split].faults)
        lines += [f"  {line}" for line in _split_lines(indexes[split], names, imgsz)]
        lines.append("")
    return "\n".join(lines + duplicate_lines(indexes)), faults


def _split_lines(index: LabelIndex, names: Mapping[int, str], imgsz: int) -> list[str]:
    lines = [f"{plural(len(index), 'usable image')} in {index.where}", index.summary()]
    sides = [f"{w}x{h}" for w, h in sorted({tuple(size) for size in index.sizes.tolist()})]
    lines.append("image sizes: " + (sides[0] if len(sides) == 1 else f"{len(sides)} kinds, {sides[0]} to {sides[-1]}"))
    if len(index.labels):
        lines += _class_lines(index, names) + _box_lines(index, imgsz)
    if index.faults:
        lines.append(f"{plural(len(index.faults), 'fault')}:")
        lines += [f"  {fault}" for fault in index.faults]
    return lines


def _class_lines(index: LabelIndex, names: Mapping[int, str]) -> list[str]:
    classes = index.labels[:, 0].astype(np.int64)
    boxes = np.bincount(classes, minlength=len(names))
    owner = np.repeat(np.arange(len(index)), np.diff(index.offsets))
    pairs = np.unique(np.stack((owner, classes)), axis=1)
    images = np.bincount(pairs[1], minlength=len(names))
    width = max(len(name) for name in names.values())
    lines = [f"{'class':>{width + 6}} {'boxes':>8} {'images':>8}"]
    for number, name in names.items():
        note = "  <- none" if not boxes[number] else ""
        lines.append(f"{number:>5} {name:>{width}} {boxes[number]:>8} {images[number]:>8}{note}")
    return lines


def _box_lines(index: LabelIndex, imgsz: int) -> list[str]:
    per_image = np.diff(index.offsets)
    scale = imgsz / index.sizes.max(1)
    wh = index.labels[:, 3:5] * np.repeat(index.sizes * scale[:, None], per_image, 0)
    side, aspect = np.sqrt(wh.prod(1)), wh.max(1) / np.maximum(wh.min(1), 1e-6)
    small, large = (side < _SMALL).mean(), (side >= _LARGE).mean()
    head = "/".join(map(str, _PERCENTILES))
    row = [", ".join(f"{v:.4g}" for v in np.percentile(values, _PERCENTILES)) for values in (side, aspect, per_image)]
    return [
        f"box side sqrt(w*h) at {imgsz} px, {head} percent: {row[0]}",
        f"small (<{_SMALL}) {small:.0%}, medium {1 - small - large:.0%}, large (>={_LARGE}) {large:.0%}",
        f"box shape max(w/h, h/w), {head} percent: {row[1]}",
        f"boxes an image, {head} percent: {row[2]}, most {per_image.max()}",
    ]


def duplicate_lines(indexes: Mapping[str, LabelIndex]) -> list[str]:
    """Images whose files are equal byte for byte, within a split and, worse, across splits."""
    groups: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    same_files = set()  # train and val may be one folder on purpose: that is said once, not for each image
    for split, index in indexes.items():
        many = len(index) > 2000
        for number in progress(range(len(index)), desc=f"{split}: comparing images", enabled=many):
            path = index.paths[number]
            groups[hashlib.sha256(Path(path).read_bytes()).digest()].append((split, path))
    equal = [group for group in groups.values() if len(group) > 1]
    across = [g for g in equal if len({split for split, _ in g}) > 1 and len({path for _, path in g}) > 1]
    for group in equal:
        if len({path for _, path in group}) < len(group):
            same_files.add(" and ".join(sorted({split for split, _ in group})))
    within = [g for g in equal if len({split for split, _ in g}) == 1]
    lines = [
        f"{splits} share files: scores on them do not show what the model has not seen" for splits in sorted(same_files)
    ]
    lines += _group_lines(across, "across splits (scores will look better than they are)")
    return (lines + _group_lines(within, "within a split")) or ["no equal images"]


def _group_lines(groups: list[list[tuple[str, str]]], what: str) -> list[str]:
    if not groups:
        return []
    lines = [f"{plural(len(groups), 'group')} of equal images {what}:"]
    lines += ["  " + " = ".join(path for _, path in group) for group in groups[:_MAX_LISTED]]
    return lines + ([f"  and {len(groups) - _MAX_LISTED} more"] if len(groups) > _MAX_LISTED else [])
