"""What an evaluation leaves behind: label files, a COCO result file, pictures of batches, curves.

The three classes are observers of engine.evaluator.evaluate: called after each batch with the batch, its detections
in network pixels, and one ImageResult an image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from utils import coco, coco_ap, curves
from utils.background import Background
from utils.console import LOGGER
from utils.errors import MissingPackage
from utils.files import atomic_write
from utils.gc_pause import collection_paused
from utils.labels import format_detections
from utils.metrics import Metrics
from utils.plots import batch_tiles, plot_batch
from utils.safe_names import UniqueNames

if TYPE_CHECKING:
    from engine.evaluator import ImageResult
    from utils.dataloaders import Batch
    from utils.helpers import Helpers
    from utils.loggers import RunLogger


class LabelWriter:
    """Writes folder/STEM.txt: ``class cx cy w h [confidence]`` a line, in 0..1 of the original image.

    An image without detections gets no file; a stem that comes again gets STEM-2.txt. ``files`` counts what was
    written.
    """

    def __init__(self, folder: Path, with_confidence: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.with_confidence, self.files = folder, with_confidence, 0
        self._names = UniqueNames()

    def __call__(self, batch: Batch, detections: Sequence[Tensor], results: Sequence[ImageResult]) -> None:
        for result in results:
            file = self.folder / f"{self._names.take(Path(result.path).stem)}.txt"
            if not len(result.detections):
                file.unlink(missing_ok=True)  # left by an earlier run of the same folder
                continue
            text = format_detections(result.detections.numpy(), result.size, self.with_confidence)
            atomic_write(file, text)
            self.files += 1


class CocoCollector:
    """Keeps what was found and the labels for COCO's evaluation. Call :meth:`begin`, :meth:`stats` and :meth:`save`
    afterwards."""

    def __init__(self, names: Mapping[int, str], categories: Sequence[int]) -> None:
        self.names, self.categories = names, categories
        self.is_coco = categories == coco.COCO_CATEGORY_IDS
        self._results: list[ImageResult] = []
        self._looked_at: list[coco_ap.Detections] = []  # of each batch: there is time, and none at the end
        self._evaluation: coco_ap.Evaluation | None = None
        self._missing: MissingPackage | None = None

    def __call__(self, batch: Batch, detections: Sequence[Tensor], results: Sequence[ImageResult]) -> None:
        found = coco_ap.Detections.of([r.detections for r in results], self.categories, first=len(self._results))
        self._looked_at.append(found.most_confident())
        self._results += results

    def save(self, file: Path) -> None:
        """Write the result file, one detection a line: all that was found, also what COCO's evaluation leaves out."""
        found = coco_ap.Detections.of([result.detections for result in self._results], self.categories)
        entries = found.entries(self._ids())
        atomic_write(file, "[" + ",\n".join(json.dumps(entry) for entry in entries) + "]\n")

    def begin(self, truth: Mapping[str, Any] | None = None, helpers: Helpers | None = None) -> None:
        """Begin with COCO's numbers, against the content of an annotation file or the labels seen during the
        evaluation, if there were any: computed by ``helpers`` from now on if there is more than one, else when
        :meth:`stats` asks."""
        shared = (helpers.begin, helpers.count) if helpers and helpers.count > 1 else ()
        if not any(len(result.labels) for result in self._results):
            return
        with collection_paused():  # none of the entries is garbage
            try:
                found = coco_ap.Detections.joined(self._looked_at)
                self._evaluation = coco_ap.Evaluation(truth or self._labels(), self._ids(), found, *shared)
            except MissingPackage as error:
                self._missing = error

    def stats(self) -> dict[str, float]:
        """COCO's numbers when they have been begun with, else none; without the package that computes them a
        warning."""
        if self._missing:
            LOGGER.warning(str(self._missing))
        return self._evaluation.stats() if self._evaluation else {}

    def _labels(self) -> dict[str, Any]:
        sizes, labels = [result.size for result in self._results], [result.labels for result in self._results]
        return coco.ground_truth(self._ids(), sizes, labels, self.names, self.categories)

    def _ids(self) -> list[int | str]:
        return coco.image_ids([result.path for result in self._results])


class BatchPictures:
    """Has the first batches drawn, in the background: folder/val_batch0_labels.jpg and val_batch0_pred.jpg, then 1
    and 2. Call :meth:`close` afterwards. A picture that cannot be written is told with a later batch or by it."""

    def __init__(self, folder: Path, names: Mapping[int, str], batches: int = 3) -> None:
        self.folder, self.names, self.batches, self._seen = folder, names, batches, 0
        self._background = Background()

    def __call__(self, batch: Batch, detections: Sequence[Tensor], results: Sequence[ImageResult]) -> None:
        self._background.check()
        if self._seen < self.batches:
            self._background(partial(self._draw, self._seen, batch, detections))  # nobody changes them: no copies
        self._seen += 1

    def _draw(self, number: int, batch: Batch, detections: Sequence[Tensor]) -> None:
        tiles = batch_tiles(batch.images)
        for boxes, kind in ((batch.targets, "labels"), (detections, "pred")):
            file = self.folder / f"val_batch{number}_{kind}.jpg"
            plot_batch(batch.images, boxes, batch.paths, self.names, file, tiles)

    def close(self) -> None:
        """Wait until they are drawn. Raises ResourceError when a picture cannot be written."""
        self._background.wait()


class FirstBatches:
    """Called with batches as they are loaded: has the first three drawn as folder/train_batch0.jpg, 1 and 2, and shown
    to ``logger``, in the background."""

    def __init__(self, folder: Path, names: Mapping[int, str], logger: RunLogger) -> None:
        self.folder, self.names, self.logger, self._seen = folder, names, logger, 0
        self._background = Background()

    def __call__(self, batch: Batch) -> None:
        if self._seen < 3:
            file = self.folder / f"train_batch{self._seen}.jpg"
            self._background(self._draw, file, batch.images, batch.targets, batch.paths)
        self._seen += 1

    def _draw(self, file: Path, images: Tensor, targets: Tensor, paths: Sequence[str]) -> None:
        picture = plot_batch(images, targets, paths, self.names, file)
        self.logger.image(file.stem, file, picture.shape[:2])

    def close(self) -> None:
        """Wait until they are drawn. Raises ResourceError when a picture cannot be written."""
        self._background.wait()


def draw_now(name: str, *arguments: Any) -> None:
    """A function of utils.curves; in the place of :meth:`utils.helpers.Helpers.draw`."""
    getattr(curves, name)(*arguments)


def save_curves(metrics: Metrics, names: Mapping[int, str], folder: Path, draw: Callable[..., None] = draw_now) -> None:
    """Have PR_curve, F1_curve, P_curve, R_curve and confusion_matrix (.png) drawn into ``folder``."""
    if not metrics.labels:
        LOGGER.info("no curves are drawn: there are no labels")
        return
    c = metrics.per_class
    shown = [names.get(int(number), str(number)) for number in c.classes]
    draw("plot_pr_curve", c.axis, c.pr_curve, c.ap[:, 0], shown, folder / "PR_curve.png")
    for values, label, stem in ((c.f1_curve, "F1", "F1"), (c.p_curve, "Precision", "P"), (c.r_curve, "Recall", "R")):
        draw("plot_confidence_curve", c.axis, values, shown, folder / f"{stem}_curve.png", label)
    if metrics.confusion is not None:
        draw("plot_confusion_matrix", metrics.confusion, list(names.values()), folder / "confusion_matrix.png")
