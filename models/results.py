"""What a Detector returns: boxes in four coordinate forms, and the ways to show, save and tabulate them."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.boxes import xyxy_to_cxcywh
from utils.console import LOGGER
from utils.crops import crop_box
from utils.errors import MissingPackage
from utils.files import new_run_dir
from utils.plots import class_colour, draw_detections, write_image
from utils.safe_names import UniqueNames, class_folders, printable
from utils.stages import STAGES, speed_line

COLUMNS = {
    "xyxy": ("xmin", "ymin", "xmax", "ymax", "confidence", "class", "name"),
    "xywh": ("xcenter", "ycenter", "width", "height", "confidence", "class", "name"),
}


class Results:
    """Detections of one or more images. Lists run over the images.

    ``ims`` uint8 (H, W, 3) RGB; ``files`` names to save under; ``pred`` = ``xyxy``: (n, 6) float32 x1, y1, x2, y2 in
    image pixels, confidence, class. ``xywh``: centre and size instead; ``xyxyn``, ``xywhn``: the same divided by image
    width and height. ``names`` class names by number; ``n`` images; ``t`` milliseconds an image for pre-processing,
    inference and NMS; ``s`` the shape (B, C, H, W) of the network input.
    """

    def __init__(
        self,
        ims: list[np.ndarray],
        pred: list[Tensor],
        files: list[str],
        names: dict[int, str],
        times: tuple[float, float, float] = (0.0, 0.0, 0.0),
        shape: tuple[int, ...] = (0, 0, 0, 0),
    ) -> None:
        self.ims, self.pred, self.files, self.names = ims, pred, files, names
        self.t, self.s, self.n = times, tuple(shape), len(pred)
        scales = [p.new_tensor([*im.shape[1::-1], *im.shape[1::-1], 1, 1]) for im, p in zip(ims, pred)]
        self.xyxy: list[Any] = pred
        self.xywh: list[Any] = [torch.cat((xyxy_to_cxcywh(p[:, :4]), p[:, 4:]), 1) for p in pred]
        self.xyxyn: list[Any] = [p / scale for p, scale in zip(self.xyxy, scales)]
        self.xywhn: list[Any] = [p / scale for p, scale in zip(self.xywh, scales)]

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Results]:
        return iter(self.tolist())

    def __getitem__(self, index: int) -> Results:
        return self.tolist()[index]

    def tolist(self) -> list[Results]:
        """One Results an image."""
        return [
            Results([im], [p], [file], self.names, self.t, self.s)
            for im, p, file in zip(self.ims, self.pred, self.files)
        ]

    def __str__(self) -> str:
        lines = [
            f"image {i}/{self.n}: {im.shape[0]}x{im.shape[1]} {count_classes(p[:, 5].tolist(), self.names)}"
            for i, (im, p) in enumerate(zip(self.ims, self.pred), 1)
        ]
        return "\n".join([*lines, speed_line(dict(zip(STAGES, self.t)), self.s)])

    def __repr__(self) -> str:
        return f"<Results of {self.n} images, {sum(len(p) for p in self.pred)} detections>"

    def print(self) -> None:
        """Print the text of str(): image size and counts per class, then the speed."""
        print(self)

    def render(self, labels: bool = True) -> list[np.ndarray]:
        """Copies of the images, uint8 (H, W, 3) RGB, with the boxes drawn in."""
        return [draw_boxes(im, p, self.names, labels=labels) for im, p in zip(self.ims, self.pred)]

    def show(self, labels: bool = True) -> None:
        """Open the pictures with the system's viewer."""
        from PIL import Image

        for image in self.render(labels):
            Image.fromarray(image).show()

    def save(self, labels: bool = True, save_dir: str | Path = "runs/detect/exp", exist_ok: bool = False) -> Path:
        """Write the drawn pictures under their file names; exp2, exp3, ... unless ``exist_ok``. Returns the folder."""
        folder = new_run_dir(Path(save_dir).parent, Path(save_dir).name, exist_ok)
        unique = UniqueNames()
        for name, image in zip(self.files, self.render(labels)):
            write_image(folder / f"{unique.take(Path(name).stem)}.jpg", image)
        LOGGER.info(f"Results saved to {folder}")
        return folder

    def crop(
        self, save: bool = True, save_dir: str | Path = "runs/detect/exp", exist_ok: bool = False
    ) -> list[dict[str, Any]]:
        """Each detection cut out: dicts of box (4,), conf, cls, label and im, uint8 (h, w, 3) RGB.

        ``save`` writes them as SAVE_DIR/crops/CLASS/NAME.jpg, NAME-2.jpg, ...
        """
        folder = new_run_dir(Path(save_dir).parent, Path(save_dir).name, exist_ok) if save else None
        folders, unique, crops = class_folders(self.names), defaultdict(UniqueNames), []
        for im, pred, file in zip(self.ims, self.pred, self.files):
            for *box, conf, cls in pred.tolist():
                name = self.names.get(int(cls), f"class{int(cls)}")
                cut = crop_box(im, box)
                crops.append({"box": box, "conf": conf, "cls": int(cls), "label": f"{name} {conf:.2f}", "im": cut})
                if folder is not None:
                    target = folder / "crops" / folders.get(int(cls), f"class{int(cls)}")
                    target.mkdir(parents=True, exist_ok=True)
                    write_image(target / f"{unique[target].take(Path(file).stem)}.jpg", cut)
        return crops

    def pandas(self) -> Results:
        """A copy whose xyxy, xyxyn, xywh and xywhn are lists of DataFrames with the class names in the last column."""
        try:
            import pandas as pd
        except ImportError:
            raise MissingPackage("Results.pandas()", "pandas") from None

        new = copy.copy(self)
        for form in ("xyxy", "xyxyn", "xywh", "xywhn"):
            columns = COLUMNS[form.removesuffix("n")]
            tables = []
            for pred in getattr(self, form):
                rows = [[*r[:5], int(r[5]), self.names.get(int(r[5]), str(int(r[5])))] for r in pred.tolist()]
                tables.append(pd.DataFrame(rows, columns=columns))
            setattr(new, form, tables)
        return new


def draw_boxes(
    image: np.ndarray,
    detections: Tensor,
    names: dict[int, str],
    width: int | None = None,
    labels: bool = True,
    confidence: bool = True,
) -> np.ndarray:
    """A copy of ``image`` uint8 (H, W, 3) RGB with (n, 6) detections drawn, the most confident last and so on top.

    ``width``: line width in pixels, from the picture's size by default. ``labels`` writes the class name,
    ``confidence`` its probability behind it.
    """
    rows = detections.flip(0).tolist()
    texts = [_label(names, int(cls), conf if confidence else None) if labels else "" for *_, conf, cls in rows]
    colours = [class_colour(int(row[5])) for row in rows]
    return draw_detections(image, np.array([row[:4] for row in rows]).reshape(-1, 4), texts, colours, width)


def _label(names: dict[int, str], number: int, confidence: float | None) -> str:
    name = printable(names.get(number, f"class{number}"))
    return name if confidence is None else f"{name} {confidence:.2f}"


def count_classes(classes: list[float], names: dict[int, str]) -> str:
    """``1 red, 2 greens``, in the order of the class numbers; ``(no detections)`` for none."""
    counts = sorted(Counter(int(c) for c in classes).items())
    if not counts:
        return "(no detections)"
    words = [f"{n} {printable(names.get(c, f'class{c}'))}{'s' if n > 1 else ''}" for c, n in counts]
    return ", ".join(words)
