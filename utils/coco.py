"""COCO's evaluation for any data set, and its JSON files.

"COCO AP" is what pycocotools computes: detections take the best free label by falling confidence, 100 boxes an image,
precision at 101 recall points averaged. It differs a little from YOLOv5's "mAP50-95" (utils/metrics.py); both are
reported under their names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import DataError, MissingPackage
from utils.gc_pause import collection_paused

# COCO's 80 classes carry numbers up to 90: these are left out
_COCO_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_CATEGORY_IDS = tuple(number for number in range(1, 91) if number not in _COCO_GAPS)
"""Category number of each of COCO's 80 classes in the order of coco.yaml."""

MAX_JSON_BYTES = 1_000_000_000  # COCO's own, with all outlines, is 20 MB for val and 450 MB for train

MAX_DETECTIONS = 100  # of an image and class, the most that COCO's evaluation takes

STATS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
STATS += ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")


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


def detections_to_coco(image_id: int | str, detections: np.ndarray, categories: Sequence[int]) -> list[dict]:
    """Entries of a COCO result file for one image.

    ``detections`` (n, 6): x1, y1, x2, y2 in pixels of the original image, confidence, class. ``bbox`` is x, y, width,
    height rounded to 3 decimals, ``score`` to 5.
    """
    detections = np.asarray(detections, np.float64).reshape(-1, 6)
    boxes = np.concatenate((detections[:, :2], detections[:, 2:4] - detections[:, :2]), 1).round(3).tolist()
    scores, classes = detections[:, 4].round(5).tolist(), detections[:, 5].astype(int).tolist()
    return [
        {"image_id": image_id, "category_id": categories[cls], "bbox": box, "score": score}
        for box, score, cls in zip(boxes, scores, classes)
    ]


def most_confident(detections: np.ndarray, per_class: int = MAX_DETECTIONS) -> np.ndarray:
    """The rows of ``detections`` (n, 6), see :func:`detections_to_coco`, that COCO's evaluation looks at: of an image
    the ``per_class`` best of each class by the scores as they are written. In their order, which decides among equals.
    """
    detections = np.asarray(detections).reshape(-1, 6)
    classes = detections[:, 5].astype(int)
    counts = np.bincount(classes)
    if not (counts > per_class).any():
        return detections
    best = np.argsort(-detections[:, 4].astype(np.float64).round(5), kind="stable")
    by_class = best[np.argsort(classes[best], kind="stable")]
    rank = np.arange(len(classes)) - np.repeat(np.cumsum(counts) - counts, counts)
    return detections[np.sort(by_class[rank < per_class])]


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


def load_annotations(path: str | Path) -> dict[str, Any]:
    """Read a COCO annotation file. Raises DataError when it is not one."""
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
    return data


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


def evaluate_coco(truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """COCO's twelve numbers (``STATS``: AP, AP50, ...) of ``detections`` against ``truth``, as pycocotools gives them.

    Image ids may be numbers or texts; only images listed in ``truth`` count. -1 stands for "no labels of that kind".
    Raises MissingPackage without faster-coco-eval.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise MissingPackage("COCO AP", "faster-coco-eval") from None

    # Both libraries want whole numbers above 0 for images and take annotation id 0 for "unmatched".
    number = {image["id"]: index for index, image in enumerate(truth["images"], 1)}
    truth = dict(truth)
    truth["images"] = [dict(image, id=number[image["id"]]) for image in truth["images"]]
    truth["annotations"] = [
        dict(entry, id=index, image_id=number[entry["image_id"]]) for index, entry in enumerate(truth["annotations"], 1)
    ]
    with collection_paused():  # it would go through a million entries again and again, a third of the time
        # an outline that is there, if only as None, is not made
        found = [
            dict(d, image_id=number[d["image_id"]], segmentation=None) for d in detections if d["image_id"] in number
        ]
        coco = COCO(truth)
        evaluation = COCOeval_faster(coco, coco.loadRes(found), "bbox", print_function=lambda *_: None)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(STATS, evaluation.stats)}
