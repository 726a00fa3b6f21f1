"""What detect.py leaves behind: annotated pictures and videos, label files, a CSV table, crops."""

from __future__ import annotations

import csv
from collections import defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import cv2
import numpy as np
from torch import Tensor

from models.results import draw_boxes
from utils.cores import available_cores
from utils.crops import crop_box, picture_suffix
from utils.errors import ResourceError
from utils.frames import Frame
from utils.labels import format_detections
from utils.plots import write_image
from utils.safe_names import UniqueNames, class_folders, spreadsheet_text

PENDING = 16
"""Pictures that wait to be drawn and written, at most: their memory."""
CSV_HEADER = ("Image Name", "Prediction", "Confidence")


@dataclass(frozen=True)
class OutputOptions:
    """What to write and how it looks. ``corners`` writes x1 y1 x2 y2 in label files instead of centre and size;
    ``thickness`` is the line width in pixels, 0 to follow the size of the picture."""

    pictures: bool = True
    text: bool = False
    text_confidence: bool = False
    corners: bool = False
    table: bool = False
    crops: bool = False
    draw_labels: bool = True
    draw_confidence: bool = True
    thickness: int = 0

    @property
    def any_file(self) -> bool:
        """Whether a run with these options writes anything at all."""
        return self.pictures or self.text or self.table or self.crops


class ResultWriter:
    """Writes the results of frames into ``folder``; a context manager, because videos and the table stay open.

    Pictures and videos are drawn and compressed by threads in the background: pictures side by side, the frames of
    videos one after another. What goes wrong there is raised by the next :meth:`write` or by :meth:`close`.

    Sources with the same file stem get -2, -3, ... so that nothing of one run replaces another's result; files of an
    earlier run in the same folder (--exist-ok) are replaced, never appended to.
    """

    def __init__(self, folder: Path, options: OutputOptions, names: dict[int, str]) -> None:
        self.folder, self.options, self.names = folder, options, names
        self.labels_written = 0
        self._stems: dict[tuple[str, int], str] = {}
        self._unique = UniqueNames()
        self._crop_names: dict[Path, UniqueNames] = defaultdict(UniqueNames)
        self._folders = class_folders(names) if options.crops else {}
        self._videos: dict[tuple[str, int], VideoFile] = {}
        self._painters = ThreadPoolExecutor(min(4, available_cores()), "pictures")
        self._film = ThreadPoolExecutor(1, "video")
        self._pending: deque[Future] = deque()
        self._table = Table(folder / "predictions.csv") if options.table else None
        if options.text:
            (folder / "labels").mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish pictures, videos and the table."""
        try:
            self._wait(0)
        finally:
            self._painters.shutdown()
            self._film.shutdown()
            for video in self._videos.values():
                video.close()
            if self._table:
                self._table.close()

    def _wait(self, most: int) -> None:
        """Until at most so many pictures are waiting to be written."""
        while len(self._pending) > most:
            self._pending.popleft().result()

    def write(self, frame: Frame, detections: Tensor, drawn: np.ndarray | None = None) -> None:
        """Write one frame's results. ``detections`` (n, 6) float32 on the CPU: x1, y1, x2, y2 in whole pixels of the
        frame, confidence, class, by falling confidence; ``drawn`` the annotated picture where there is one already."""
        stem = self._stem(frame)
        if self.options.text:
            self._write_labels(frame, stem, detections)
        if self._table:
            for *_, conf, cls in detections.flip(0).tolist():
                self._table.row(frame.name, self.class_name(int(cls)), conf)
        if self.options.crops:
            self._write_crops(frame, stem, detections)
        if self.options.pictures:
            threads = self._painters if frame.kind == "image" else self._film
            self._pending.append(threads.submit(self._write_image, frame, stem, detections, drawn))
            self._wait(PENDING)

    def draw(self, frame: Frame, detections: Tensor) -> np.ndarray:
        """A copy of the frame, uint8 (H, W, 3) RGB, with the detections drawn as the options say."""
        options = self.options
        return draw_boxes(
            frame.image, detections, self.names, options.thickness, options.draw_labels, options.draw_confidence
        )

    def class_name(self, number: int) -> str:
        """The name of a class, or its number in words."""
        return self.names.get(number, f"class{number}")

    def _stem(self, frame: Frame) -> str:
        key = (frame.path, frame.item)
        if key not in self._stems:
            stem = Path(frame.name).stem
            if frame.kind != "image" and self._unique.holds_frames_of(stem):
                stem += "-video"  # a picture clip_1.jpg and frame 1 of clip.mp4 would share labels/clip_1.txt
            self._stems[key] = self._unique.take(stem)
        return self._stems[key]

    def _write_labels(self, frame: Frame, stem: str, detections: Tensor) -> None:
        name = stem if frame.kind == "image" else f"{stem}_{frame.index}"
        path = self.folder / "labels" / f"{name}.txt"
        if not len(detections):
            path.unlink(missing_ok=True)  # left by an earlier run of the same folder
            return
        height, width = frame.image.shape[:2]
        options = self.options
        rows = detections.flip(0).numpy()  # the least confident first
        text = format_detections(rows, (height, width), options.text_confidence, options.corners)
        path.write_text(text, encoding="utf-8")
        self.labels_written += 1

    def _write_crops(self, frame: Frame, stem: str, detections: Tensor) -> None:
        for *box, _, cls in detections.flip(0).tolist():
            folder = self.folder / "crops" / self._folders.get(int(cls), f"class{int(cls)}")
            if folder not in self._crop_names:
                folder.mkdir(parents=True, exist_ok=True)
            name = self._crop_names[folder].take(stem)
            write_image(folder / f"{name}.jpg", crop_box(frame.image, box))

    def _write_image(self, frame: Frame, stem: str, detections: Tensor, drawn: np.ndarray | None) -> None:
        drawn = self.draw(frame, detections) if drawn is None else drawn
        if frame.kind == "image":
            write_image(self.folder / f"{stem}{picture_suffix(frame.name)}", drawn)
            return
        key = (frame.path, frame.item)
        if key not in self._videos:
            self._videos[key] = VideoFile(self.folder / f"{stem}.mp4", frame.fps)
        self._videos[key].add(drawn)


class VideoFile:
    """An .mp4 (mp4v) that starts with its first frame, and goes on in NAME_part2.mp4 when the frame size changes."""

    def __init__(self, path: Path, fps: float) -> None:
        self._path, self._fps = path, fps
        self._parts = 0
        self._size: tuple[int, int] | None = None
        self._writer: cv2.VideoWriter | None = None

    def add(self, image: np.ndarray) -> None:
        """Append uint8 (H, W, 3) RGB. Raises ResourceError when the file cannot be written."""
        size = (image.shape[1], image.shape[0])
        if size != self._size:
            self._start(size)
        self._writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))

    def _start(self, size: tuple[int, int]) -> None:
        self.close()
        self._parts, self._size = self._parts + 1, size
        part = "" if self._parts == 1 else f"_part{self._parts}"
        path = self._path.with_name(f"{self._path.stem}{part}.mp4")
        self._writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), self._fps, size)
        if not self._writer.isOpened():
            raise ResourceError(f"{path}: a {size[0]}x{size[1]} video cannot be written; check space and permissions")

    def close(self) -> None:
        """Write the file's index; without it players refuse the video."""
        if self._writer is not None:
            self._writer.release()
            self._writer = None


class Table:
    """predictions.csv, one row a detection; names that a spreadsheet would run as a formula get a leading quote."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("w", newline="", encoding="utf-8", errors="backslashreplace")
        self._csv = csv.writer(self._file)
        self._csv.writerow(CSV_HEADER)

    def row(self, image: str, name: str, confidence: float) -> None:
        """Add one detection."""
        self._csv.writerow((spreadsheet_text(image), spreadsheet_text(name), f"{confidence:.2f}"))

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()
