"""What each best.pt finds on a split: measured through val.py's own pass, kept as .npz."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import val
from comparison.matching import Predictions
from utils.config import DataConfig
from utils.console import LOGGER
from utils.errors import DataError
from utils.files import atomic_open
from utils.npz import NPZ_DAMAGE, check_offsets, read_npz

if TYPE_CHECKING:
    import torch

    from engine.evaluator import ImageResult

KINDS = {
    "paths": (np.uint8, None),
    "detections": (np.float32, 6),
    "detection_offsets": (np.int64, None),
    "labels": (np.float32, 5),
    "label_offsets": (np.int64, None),
}
"""Arrays of the file: those of Predictions, the paths as UTF-8 with a zero byte after each."""


class _Collector:
    """An observer of engine.evaluator.evaluate that keeps every image's result."""

    def __init__(self) -> None:
        self.results: list[ImageResult] = []

    def __call__(self, batch: Any, detections: Any, results: Sequence[ImageResult]) -> None:
        self.results += results


def predict(weights: Path, data: DataConfig, split: str, flags: Sequence[str], device: torch.device) -> Predictions:
    """Run val.py's pass over a split, in float32. ``flags``: val.py's, for the image size, loader and kernels."""
    import torch

    from models.surgery import use_dcn_backend

    args = val.parse_args(["--weights", str(weights), "--data", str(data.source), "--task", split, *flags])
    model = val.load([str(weights)], data, device, args)
    use_dcn_backend(model, args.dcn_backend, device, torch.float32)
    collector = _Collector()
    metrics = val.one_pass(args, data, model, device, [collector])
    LOGGER.info(metrics.table(data.names, verbose=False))
    results = collector.results
    return Predictions(
        tuple(result.path for result in results),
        np.concatenate([np.zeros((0, 6), np.float32), *(result.detections.numpy() for result in results)]),
        _offsets([len(result.detections) for result in results]),
        np.concatenate([np.zeros((0, 5), np.float32), *(result.labels.numpy() for result in results)]),
        _offsets([len(result.labels) for result in results]),
    )


def _offsets(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int64)


def save(found: Predictions, file: Path) -> None:
    """Write an .npz, whole or not at all."""
    text = "".join(f"{path}\0" for path in found.paths).encode("utf-8", "surrogateescape")
    arrays = {name: getattr(found, name) for name in KINDS if name != "paths"}
    memory = io.BytesIO()
    np.savez(memory, paths=np.frombuffer(text, np.uint8), **arrays)
    with atomic_open(file) as out:
        out.write(memory.getbuffer())


def load(file: Path) -> Predictions:
    """Read what :func:`save` wrote. Raises DataError for anything else."""
    try:
        arrays = read_npz(file, KINDS)
        paths = arrays.pop("paths").tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
        for kind in ("detection", "label"):
            check_offsets(arrays[f"{kind}_offsets"], len(paths), len(arrays[f"{kind}s"]))
    except NPZ_DAMAGE:
        raise DataError(f"{file}: damaged; remove it, and it is made again") from None
    return Predictions(tuple(paths), **arrays)


def predictions_of(file: Path, weights: Path, *how: Any) -> Predictions:
    """The file's content when it is newer than the weights, else :func:`predict` with ``how``, saved there."""
    if file.is_file() and file.stat().st_mtime_ns >= weights.stat().st_mtime_ns:
        return load(file)
    found = predict(weights, *how)
    save(found, file)
    return found


def aligned(found: Predictions, first: Predictions) -> Predictions:
    """``found`` with its images in the order of ``first``: models of another stride see them in another. Raises
    DataError when they are not the same images, or have other labels."""
    found = _in_order(found, first.paths)
    if not (np.array_equal(found.labels, first.labels) and np.array_equal(found.label_offsets, first.label_offsets)):
        raise DataError(
            "the labels of a split changed during the comparison: remove the folder predictions/ in it, whose files "
            "are made again, and --resume"
        )
    return found


def _in_order(found: Predictions, paths: Sequence[str]) -> Predictions:
    if found.paths == tuple(paths):
        return found
    if sorted(found.paths) != sorted(paths):
        raise DataError("the images of a split changed during the comparison; use another --name to begin anew")
    place = {path: index for index, path in enumerate(found.paths)}
    rows = [found.of_image(place[path]) for path in paths]
    return Predictions(
        tuple(paths),
        np.concatenate([detections for detections, _ in rows]),
        _offsets([len(detections) for detections, _ in rows]),
        np.concatenate([labels for _, labels in rows]),
        _offsets([len(labels) for _, labels in rows]),
    )
