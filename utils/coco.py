"""COCO's numbers of images and classes, and its annotation files. The evaluation is utils/coco_ap.py."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import DataError
from utils.gc_pause import collection_paused

# COCO's 80 classes carry numbers up to 90: these are left out
_COCO_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_CATEGORY_IDS = tuple(number for number in range(1, 91) if number not in _COCO_GAPS)
"""Category number of each of COCO's 80 classes in the order of coco.yaml."""

LOOKED_AT = {
    "images": ("id",),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
    "categories": ("id",),
}
"""Of an annotation file: outlines, the most of it, are not."""

MAX_JSON_BYTES = 1_000_000_000  # COCO's own, with all outlines, is 20 MB for val and 450 MB for train


def image_ids(paths: Sequence[str | Path]) -> list[int | str]:
    """COCO's image id of each file: its stem, as a number if it is one. Stems that would collide keep their path."""
    stems = [Path(path).stem for path in paths]
    ids: list[int | str] = [int(stem) if stem.isdecimal() and stem.isascii() else stem for stem in stems]
    return ids if len(set(ids)) == len(ids) else [str(path) for path in paths]


def category_ids(val_sources: Iterable[str | Path], nc: int) -> tuple[int, ...]:
    """Category number of each class: COCO's 1..90 when the images are COCO val2017, else the class number itself."""
    sources = [Path(source).as_posix() for source in val_sources]
    is_coco = nc == 80 and any(s.endswith(("coco/val2017.txt", "coco/images/val2017")) for s in sources)
    return COCO_CATEGORY_IDS if is_coco else tuple(range(nc))


def ground_truth(
    ids: Sequence[int | str],
    sizes: Sequence[tuple[int, int]],
    labels: Sequence[np.ndarray],
    names: Mapping[int, str],
    categories: Sequence[int],
) -> dict[str, Any]:
    """A COCO annotation mapping made from YOLO labels: of each image its id, (h, w) pixels and labels (m, 5) class,
    x1, y1, x2, y2 in pixels. The area is the box's; nothing is a crowd."""
    images = [{"id": i, "height": h, "width": w} for i, (h, w) in zip(ids, sizes)]
    annotations = []
    for image_id, rows in zip(ids, labels):
        for cls, x1, y1, x2, y2 in np.asarray(rows, np.float64).reshape(-1, 5).tolist():
            box = [x1, y1, x2 - x1, y2 - y1]
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": categories[int(cls)]}
            annotations.append(entry | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    listed = [{"id": categories[number], "name": name} for number, name in names.items()]
    return {"images": images, "annotations": annotations, "categories": listed}


@collection_paused()  # none of the entries is garbage
def load_annotations(path: str | Path) -> dict[str, Any]:
    """Read a COCO annotation file: what an evaluation of boxes looks at. Raises DataError when it is not one."""
    try:
        if Path(path).stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES // 1_000_000:,} MB")
        data = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a COCO annotation file ({error})") from None
    if not isinstance(data, dict) or not {"images", "annotations", "categories"} <= data.keys():
        raise DataError(f"{path}: not a COCO annotation file (it needs images, annotations and categories)")
    if fault := _annotation_fault(data):
        raise DataError(f"{path}: not a COCO annotation file ({fault})")
    return {part: [{name: entry[name] for name in names if name in entry} for entry in data[part]]
            for part, names in LOOKED_AT.items()}  # fmt: skip


def _annotation_fault(data: dict[str, Any]) -> str | None:
    """What the evaluation, which is compiled code, would stumble over; None when there is nothing."""
    for part in ("images", "annotations", "categories"):
        if not isinstance(data[part], list) or not all(isinstance(entry, dict) for entry in data[part]):
            return f"{part} is no list of entries"
    images, categories = ([entry.get("id") for entry in data[part]] for part in ("images", "categories"))
    if not all(type(i) in (int, str) for i in images) or not all(type(i) is int for i in categories):
        return "an image or category without a plain id"
    known, kinds = set(images), set(categories)
    for number, entry in enumerate(data["annotations"]):
        box = entry.get("bbox")
        numbers = [*box, entry.get("area")] if isinstance(box, list) and len(box) == 4 else [None]
        if not all(type(n) in (int, float) and abs(n) < 1e9 for n in numbers):
            return f"annotation {number} has no box of four numbers with an area"
        image, kind = entry.get("image_id"), entry.get("category_id")
        if type(image) not in (int, str) or image not in known or type(kind) is not int or kind not in kinds:
            return f"annotation {number} is of an image or category that is not listed"
        if entry.get("iscrowd", 0) not in (0, 1):
            return f"annotation {number}: iscrowd is neither 0 nor 1"
    return None
