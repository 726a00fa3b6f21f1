"""What every source yields and how OpenCV's captures are read: the parts that files and live streams share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

URL_SCHEMES = ("http://", "https://", "rtsp://", "rtmp://", "rtsps://", "udp://", "tcp://")
FALLBACK_FPS = 30.0


@dataclass(frozen=True)
class Frame:
    """One picture to look at. ``image`` is uint8 (H, W, 3) RGB, contiguous.

    ``path`` is what the console shows, ``name`` the plain file name results are saved under. ``kind``: 'image',
    'video' (a file, it ends) or 'stream' (live). ``item`` of ``items`` counts sources from 1; ``index`` of ``total``
    counts frames of a video from 1 in the file's own numbering (``total`` 0: unknown). ``fps`` frames a second
    that results should be played at; 0 for pictures.
    """

    image: np.ndarray
    path: str
    name: str
    kind: str = "image"
    item: int = 1
    items: int = 1
    index: int = 0
    total: int = 0
    fps: float = 0.0


class Source:
    """Base of everything that yields frames. ``live`` sources run until stopped; ``failed`` lists unreadable items."""

    live = False

    def __init__(self) -> None:
        self.failed: list[str] = []

    def __iter__(self) -> Iterator[Frame]:
        raise NotImplementedError

    def close(self) -> None:
        """Stop threads and release devices; calling it twice does no harm."""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def suffix_of(path: str) -> str:
    """The suffix in lower case with its dot; for URLs, of the part before ``?`` and ``#``."""
    return Path(path.split("?")[0].split("#")[0] if is_url(path) else path).suffix.lower()


def is_url(text: str) -> bool:
    """Whether the text starts with a scheme that OpenCV can open."""
    return text.lower().startswith(URL_SCHEMES)


def frames_per_second(capture: cv2.VideoCapture) -> float:
    """What the file or device says, or 30 when that is no sensible number."""
    fps = capture.get(cv2.CAP_PROP_FPS)
    return fps if math.isfinite(fps) and 0 < fps <= 1000 else FALLBACK_FPS


def next_frame(capture: cv2.VideoCapture, stride: int = 1) -> np.ndarray | None:
    """Step ``stride`` frames and decode the last one to uint8 (H, W, 3) RGB; None at the end or when it fails."""
    for _ in range(stride):
        if not capture.grab():
            return None
    ok, image = capture.retrieve()
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if ok and image is not None else None


OpenCapture = Callable[[int | str], cv2.VideoCapture]
"""How a stream is opened; tests give their own."""
