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
    """Detections of several images as a COCO result file gives them.

    ``image`` (n,) int64, the image's number; ``boxes`` (n, 4) float64 x, y, width, height in pixels of the original
    image, rounded to 3 decimals; ``scores`` (n,) float64, rounded to 5; ``categories`` (n,) int64.
    """

    image: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    categories: np.ndarray

    @staticmethod
    def of(found: Sequence[np.ndarray], categories: Sequence[int], first: int = 0) -> Detections:
        """``found``: of each image (n, 6) x1, y1, x2, y2 in pixels of the original image, confidence, class;
        ``categories``: category number of each class; ``first``: the first image's number."""
        found = [np.asarray(rows).reshape(-1, 6) for rows in found]
        rows = np.concatenate([np.empty((0, 6)), *found]).astype(np.float64)
        boxes = np.concatenate((rows[:, :2], rows[:, 2:4] - rows[:, :2]), 1).round(3)
        image = np.repeat(np.arange(first, first + len(found)), [len(rows) for rows in found])
        return Detections(image, boxes, rows[:, 4].round(5), np.asarray(categories)[rows[:, 5].astype(np.int64)])

    @staticmethod
    def joined(parts: Sequence[Detections]) -> Detections:
        """Those of at least one part, one after another."""
        return Detections(*(np.concatenate(values) for values in zip(*(part._values() for part in parts))))

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, chosen: np.ndarray) -> Detections:
        """Those at these places, or where this mask is True."""
        return Detections(*(values[chosen] for values in self._values()))

    def most_confident(self, per_class: int = MAX_DETECTIONS) -> Detections:
        """Those that COCO's evaluation looks at: of each image the ``per_class`` best of each class. In their order,
        which decides among equals."""
        best = np.argsort(-self.scores, kind="stable")
        group = self.image * (self.categories.max(initial=0) + 1) + self.categories
        return self[np.sort(best[earlier(group[best]) < per_class])]

    def entries(self, ids: Sequence[int | str]) -> list[dict[str, Any]]:
        """The content of a COCO result file; ``ids``: COCO's id of each image."""
        with collection_paused():  # none of a million entries is garbage
            return [
                {"image_id": ids[image], "category_id": category, "bbox": box, "score": score}
                for image, box, score, category in zip(*(values.tolist() for values in self._values()))
            ]

    def _values(self) -> tuple[np.ndarray, ...]:
        return self.image, self.boxes, self.scores, self.categories


def prepare_evaluation() -> None:
    """Have what evaluates imported."""
    import faster_coco_eval  # noqa: F401


class Evaluation:
    """COCO's twelve numbers (``STATS``: AP, AP50, ...) of detections against labels, as pycocotools gives them."""

    def __init__(
        self,
        truth: Mapping[str, Any],
        ids: Sequence[int | str],
        detections: Detections,
        begin: Begin = partial,
        shares: int = 1,
    ) -> None:
        """``truth``: a COCO annotation mapping; ``ids``: its id, number or text, of each image that ``detections``
        number from 0. Only images listed there count; of an image and class the MAX_DETECTIONS best.

        The classes are evaluated in up to ``shares`` calls, which ``begin`` begins, by itself when they are asked for.
        Raises MissingPackage without faster-coco-eval.
        """
        try:
            prepare_evaluation()
        except ImportError:
            raise MissingPackage("COCO AP", "faster-coco-eval") from None
        # Both libraries want whole numbers above 0 for images and take annotation id 0 for "unmatched".
        listed = list(dict.fromkeys(image["id"] for image in truth["images"]))
        if all(isinstance(image_id, int) for image_id in listed):
            listed.sort()  # pycocotools' order, which decides among equal scores
        number = {image_id: index for index, image_id in enumerate(listed, 1)}
        image = np.array([number.get(i, 0) for i in ids], np.int64)[detections.image]
        kinds = np.array(sorted({category["id"] for category in truth["categories"]}), np.int64)
        place = np.searchsorted(kinds, detections.categories)  # of each one's category among them
        wanted = (image > 0) & (place < len(kinds)) & (np.append(kinds, 0)[place] == detections.categories)
        detections = replace(detections, image=image)
        if not wanted.all():
            detections, place = detections[wanted], place[wanted]
        owner = _dealt(np.bincount(place, minlength=len(kinds)), shares)
        self._dealt = [kinds[owner == share].tolist() for share in range(owner.max(initial=0) + 1)]
        self._parts = []
        for share, group in enumerate(self._dealt):
            labels, found = _labels(truth, number, group), detections[owner[place] == share]
            self._parts.append(begin(evaluate_classes, group, len(number), labels, found))

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


def _dealt(counts: np.ndarray, shares: int) -> np.ndarray:
    """(k,) int64: the share of each category, of which there are at most ``shares`` with about as many detections each:
    the largest first, each to the share that has least. ``counts`` (k,): detections of each category."""
    owner, loads = np.zeros(len(counts), np.int64), [0] * max(1, min(shares, len(counts)))
    for kind in np.argsort(-counts, kind="stable").tolist():
        owner[kind] = loads.index(min(loads))
        loads[owner[kind]] += int(counts[kind])
    return owner


def _labels(truth: Mapping[str, Any], number: Mapping[int | str, int], kinds: Sequence[int]) -> list[dict]:
    """The annotations of these categories, images by their number."""
    wanted = set(kinds)
    return [
        dict(entry, image_id=number[entry["image_id"]])
        for entry in truth["annotations"]
        if entry["category_id"] in wanted
    ]


def evaluate_classes(
    kinds: Sequence[int], images: int, labels: Sequence[dict], detections: Detections
) -> dict[str, np.ndarray]:
    """COCO's evaluation of some categories: ``precision`` (T, R, K, A, M) and ``recall`` (T, K, A, M), pycocotools'
    arrays, -1 where there are no labels.

    ``images``: they are numbered from 1; ``labels``: COCO annotations without ids; ``detections``: their ``image`` is
    the image's number.
    """
    from faster_coco_eval import COCOeval_faster

    box = detections.boxes
    parts = (detections.image, detections.categories, box, detections.scores, box[:, 2] * box[:, 3])
    with collection_paused():  # it would go through all entries again and again, a third of the time
        found = [
            {"id": number, "image_id": image, "category_id": kind, "bbox": box, "score": score, "area": area}
            for number, (image, kind, box, score, area) in enumerate(zip(*(part.tolist() for part in parts)), 1)
        ]
        given = [dict(label, id=number) for number, label in enumerate(labels, 1)]
        truth, results = (_Listed(images, kinds, entries) for entries in (given, found))
        evaluation = COCOeval_faster(truth, results, "bbox", print_function=lambda *_: None)
        evaluation.evaluate()
        evaluation.accumulate()
    return {name: np.asarray(evaluation.eval[name]) for name in ("precision", "recall")}


@dataclass(frozen=True)
class _Listed:
    """Annotations as the evaluation asks for them, which is for all: a COCO object would make a dozen tables, for other
    questions, in as much time as the evaluation takes."""

    images: int
    kinds: Sequence[int]
    entries: list[dict]

    def getImgIds(self) -> list[int]:
        return list(range(1, self.images + 1))

    def getCatIds(self) -> list[int]:
        return list(self.kinds)

    def getAnnIds(self, imgIds: Sequence[int], catIds: Sequence[int]) -> range:
        return range(len(self.entries))

    def loadAnns(self, ids: range) -> list[dict]:
        return self.entries
