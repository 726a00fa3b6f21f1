"""Sources -> model -> NMS -> pictures, labels, crops: the loop behind detect.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.feature_maps import record_features, save_features
from engine.read_ahead import in_batches, read_ahead
from engine.window import Window
from engine.writers import ResultWriter
from models.api import Detector
from models.results import count_classes
from utils.augmentations import letterbox_fit
from utils.console import LOGGER, plural
from utils.frames import Frame, Source
from utils.safe_names import UniqueNames, printable
from utils.stages import STAGES, speed_line

READ_AHEAD = 4
"""Frames."""


@dataclass
class Summary:
    """How a run went. ``milliseconds``: sums over all frames of pre-processing, inference and NMS."""

    frames: int = 0
    detections: int = 0
    milliseconds: tuple[float, float, float] = (0.0, 0.0, 0.0)
    shape: tuple[int, ...] = ()
    interrupted: bool = False

    def add(self, found: int, milliseconds: tuple[float, float, float], shape: tuple[int, ...]) -> None:
        """Count one frame."""
        self.frames += 1
        self.detections += found
        self.milliseconds = tuple(a + b for a, b in zip(self.milliseconds, milliseconds))
        self.shape = shape

    @property
    def speed(self) -> tuple[float, float, float]:
        """Milliseconds a frame of each stage; zeros when there was no frame."""
        return tuple(total / max(self.frames, 1) for total in self.milliseconds)


def predict(
    detector: Detector,
    source: Source,
    writer: ResultWriter,
    imgsz: tuple[int, int] = (640, 640),
    window: Window | None = None,
    feature_folder: Path | None = None,
    on_frame: Callable[[Frame, Tensor], None] | None = None,
    batch_size: int = 1,
) -> Summary:
    """Run the detector over every frame of ``source`` and write what ``writer`` is set to write.

    ``imgsz`` (height, width) is rounded up to the stride; each frame is letterboxed to the smallest rectangle of
    stride multiples that holds it. ``feature_folder``: where --visualize puts the feature maps of each picture (of a
    video, its first frame). ``on_frame`` is called with each frame and its (n, 6) detections in whole pixels.
    ``batch_size``: up to so many frames in a row, of the same network size, go through the model together. Files are
    read ahead by a thread; live sources are not, what they show next is newer.
    Ctrl-C, and q in the window, end the loop with all files whole; the summary says so. Whatever the source could
    not read is in ``source.failed``.
    """
    imgsz = detector.round_size(imgsz)
    detector.warmup(imgsz)
    summary, maps = Summary(), _FeatureMaps(feature_folder)
    frames = source if source.live else read_ahead(source, max(READ_AHEAD, batch_size))
    size = 1 if source.live or feature_folder else batch_size
    try:
        for batch in in_batches(frames, size, lambda frame: letterbox_fit(frame.image.shape[:2], imgsz).size):
            with maps.recording(detector, batch[0]):
                found, milliseconds, shape = detector.detect([frame.image for frame in batch], imgsz)
            for frame, boxes in zip(batch, found):
                detections = whole_pixels(boxes)
                summary.add(len(detections), milliseconds, shape)
                LOGGER.info(frame_line(frame, shape, detections, detector.names, milliseconds[1]))
                drawn = writer.draw(frame, detections) if window else None
                writer.write(frame, detections, drawn)
                if on_frame:
                    on_frame(frame, detections)
                if window and window.show(frame.path, drawn):
                    return summary
    except KeyboardInterrupt:
        summary.interrupted = True
    return summary


def whole_pixels(detections: Tensor) -> Tensor:
    """(n, 6) detections with their boxes rounded to whole pixels, a new tensor."""
    rounded = detections.clone()
    rounded[:, :4] = rounded[:, :4].round()
    return rounded


def frame_line(
    frame: Frame, shape: tuple[int, ...], detections: Tensor, names: dict[int, str], milliseconds: float
) -> str:
    """``image 1/10 PATH: 96x128 1 red, 2 greens, 11.3ms``; videos count frames too, streams show their number."""
    path = printable(frame.path)
    where = {
        "image": f"image {frame.item}/{frame.items} {path}",
        "video": f"video {frame.item}/{frame.items} ({frame.index}/{frame.total or '?'}) {path}",
        "stream": f"{frame.item - 1} ({frame.index}) {path}",
    }[frame.kind]
    counts = count_classes(detections[:, 5].tolist(), names)
    return f"{where}: {shape[2]}x{shape[3]} {counts}, {milliseconds:.1f}ms"


def closing_lines(summary: Summary, writer: ResultWriter, saved: bool) -> None:
    """Say how fast it was and, when anything was ``saved``, where it is."""
    if summary.frames:
        LOGGER.info(speed_line(dict(zip(STAGES, summary.speed)), summary.shape))
    if saved:
        LOGGER.info(f"Results saved to {writer.folder}")
    if writer.options.text:
        LOGGER.info(f"{plural(writer.labels_written, 'label')} saved to {writer.folder / 'labels'}")


class _FeatureMaps:
    """Saves the feature maps of each picture and of each video's first frame, in a folder of its own."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._unique = folder, UniqueNames()
        self._seen: set[tuple[str, int]] = set()

    @contextmanager
    def recording(self, detector: Detector, frame: Frame) -> Iterator[None]:
        """Record while the detector looks at ``frame``, then save."""
        if self._folder is None or (frame.path, frame.item) in self._seen:
            yield
            return
        self._seen.add((frame.path, frame.item))
        with record_features(detector.model) as features:
            yield
        save_features(features, self._folder / self._unique.take(Path(frame.name).stem))
