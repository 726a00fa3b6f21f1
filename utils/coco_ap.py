"""COCO AP: faster-coco-eval's evaluation of any data set, with the classes dealt out among processes.

"COCO AP" is what pycocotools computes: detections take the best free label by falling confidence, 100 boxes an image
and class, precision at 101 recall points averaged. It differs a little from YOLOv5's "mAP50-95" (utils/metrics.py);
both are reported under their names.

COCO evaluates one class after another and knows no other number than means over classes, so that the classes of a data
set can be evaluated apart and put together to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from utils.errors import MissingPackage
from utils.gc_pause import collection_paused
from utils.repeats import earlier

MAX_DETECTIONS = 100  # of an image and class, the most that COCO's evaluation takes

STATS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
STATS += ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")

Begin = Callable[..., Callable[[], Any]]
"""(function, arguments) -> what waits for its result."""


@dataclass(frozen=True, eq=False)
class Detections:
    """The detections of all images as a COCO result file gives them.

    ``ids``: COCO's id of each image; ``image`` (n,) int64, the place in ``ids``; ``boxes`` (n, 4) float64 x, y, width,
    height in pixels of the original image, rounded to 3 decimals; ``scores`` (n,) float64, rounded to 5;
    ``categories`` (n,) int64.
    """

    ids: Sequence[int | str]
    image: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    categories: np.ndarray

    @staticmethod
    def of(ids: Sequence[int | str], found: Sequence[np.ndarray], categories: Sequence[int]) -> Detections:
        """``found``: of each image (n, 6) x1, y1, x2, y2 in pixels of the original image, confidence, class;
        ``categories``: category number of each class."""
        found = [np.asarray(rows).reshape(-1, 6) for rows in found]
        rows = np.concatenate([np.empty((0, 6)), *found]).astype(np.float64)
        boxes = np.concatenate((rows[:, :2], rows[:, 2:4] - rows[:, :2]), 1).round(3)
        image = np.repeat(np.arange(len(found)), [len(rows) for rows in found])
        return Detections(ids, image, boxes, rows[:, 4].round(5), np.asarray(categories)[rows[:, 5].astype(np.int64)])

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, chosen: np.ndarray) -> Detections:
        """Those at these places, or where this mask is True."""
        parts = (self.image, self.boxes, self.scores, self.categories)
        return Detections(self.ids, *(part[chosen] for part in parts))

    def most_confident(self, per_class: int = MAX_DETECTIONS) -> Detections:
        """Those that COCO's evaluation looks at: of each image the ``per_class`` best of each class. In their order,
        which decides among equals."""
        best = np.argsort(-self.scores, kind="stable")
        group = self.image * (self.categories.max(initial=0) + 1) + self.categories
        return self[np.sort(best[earlier(group[best]) < per_class])]

    def entries(self) -> list[dict[str, Any]]:
        """The content of a COCO result file."""
        parts = (self.image.tolist(), self.boxes.tolist(), self.scores.tolist(), self.categories.tolist())
        with collection_paused():  # none of a million entries is garbage
            return [
                {"image_id": self.ids[image], "category_id": category, "bbox": box, "score": score}
                for image, box, score, category in zip(*parts)
            ]


def prepare_evaluation() -> None:
    """Have what evaluates imported."""
    import faster_coco_eval  # noqa: F401


class Evaluation:
    """COCO's twelve numbers (``STATS``: AP, AP50, ...) of detections against labels, as pycocotools gives them."""

    def __init__(
        self, truth: Mapping[str, Any], detections: Detections, begin: Begin = partial, shares: int = 1
    ) -> None:
        """``truth``: a COCO annotation mapping. Image ids may be numbers or texts; only images listed there count.

        The classes are evaluated in up to ``shares`` calls, which ``begin`` begins, by itself when they are asked for.
        Raises MissingPackage without faster-coco-eval.
        """
        try:
            prepare_evaluation()
        except ImportError:
            raise MissingPackage("COCO AP", "faster-coco-eval") from None
        # Both libraries want whole numbers above 0 for images and take annotation id 0 for "unmatched".
        ids = dict.fromkeys(image["id"] for image in truth["images"])
        number = {image_id: index for index, image_id in enumerate(ids, 1)}
        image = np.array([number.get(i, 0) for i in detections.ids], np.int64)[detections.image]
        detections = replace(detections, image=image)[image > 0].most_confident()
        kinds = sorted({category["id"] for category in truth["categories"]})
        self._dealt = _dealt(kinds, detections.categories, shares)
        self._parts = [
            begin(evaluate_classes, group, *_share(truth, number, detections, group)) for group in self._dealt
        ]

    def stats(self) -> dict[str, float]:
        """Waits for them. -1 stands for "no labels of that kind"."""
        from faster_coco_eval import COCOeval_faster

        parts = [part() for part in self._parts]
        evaluation = COCOeval_faster(iouType="bbox", print_function=lambda *_: None)
        order = np.argsort(np.concatenate([np.zeros(0), *self._dealt]), kind="stable")
        precision, recall = (np.concatenate([part[name] for part in parts], -3) for name in ("precision", "recall"))
        evaluation.eval = {"precision": precision[:, :, order], "recall": recall[:, order]}
        evaluation.summarize()
        return {name: float(value) for name, value in zip(STATS, evaluation.stats)}


def _dealt(kinds: Sequence[int], found: np.ndarray, shares: int) -> list[list[int]]:
    """Categories in at most ``shares`` groups with about as many detections each: the largest first, each to the
    group that has least."""
    groups: list[list[int]] = [[] for _ in range(max(1, min(shares, len(kinds))))]
    loads = [0] * len(groups)
    counts = dict(zip(*(part.tolist() for part in np.unique(found, return_counts=True))))
    for count, kind in sorted(((counts.get(kind, 0), kind) for kind in kinds), reverse=True):
        least = loads.index(min(loads))
        groups[least].append(kind)
        loads[least] += count
    return [sorted(group) for group in groups]


def _share(
    truth: Mapping[str, Any], number: Mapping[int | str, int], detections: Detections, kinds: Sequence[int]
) -> tuple[int, list[dict], Detections]:
    """What :func:`evaluate_classes` needs to know of these categories."""
    wanted = set(kinds)
    labels = [
        dict(entry, image_id=number[entry["image_id"]])
        for entry in truth["annotations"]
        if entry["category_id"] in wanted
    ]
    return len(number), labels, replace(detections[np.isin(detections.categories, kinds)], ids=())


def evaluate_classes(
    kinds: Sequence[int], images: int, labels: Sequence[dict], detections: Detections
) -> dict[str, np.ndarray]:
    """COCO's evaluation of some categories: ``precision`` (T, R, K, A, M) and ``recall`` (T, K, A, M), pycocotools'
    arrays, -1 where there are no labels.

    ``images``: they are numbered from 1; ``labels``: COCO annotations without ids; ``detections``: their ``image`` is
    the image's number.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    parts = (detections.image.tolist(), detections.boxes.tolist(), detections.scores.tolist())
    with collection_paused():  # it would go through all entries again and again, a third of the time
        # an outline that is there, if only as None, is not made
        found = [
            {"image_id": image, "category_id": category, "bbox": box, "score": score, "segmentation": None}
            for image, box, score, category in zip(*parts, detections.categories.tolist())
        ]
        about = {
            "images": [{"id": number} for number in range(1, images + 1)],
            "categories": [{"id": kind} for kind in kinds],
        }
        coco = COCO(about | {"annotations": [dict(label, id=number) for number, label in enumerate(labels, 1)]})
        results = coco.loadRes(found) if found else COCO(about | {"annotations": []})  # older ones need one at least
        evaluation = COCOeval_faster(coco, results, "bbox", print_function=lambda *_: None)
        evaluation.evaluate()
        evaluation.accumulate()
    return {name: np.asarray(evaluation.eval[name]) for name in ("precision", "recall")}
