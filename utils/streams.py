"""Live sources: webcams, network streams, the screen. The newest frame counts; old ones are dropped, never queued.

Each stream has a reader thread that keeps only its last frame, so a slow model sees the present instead of a growing
delay. A lost stream is opened again after 1, 2, 4, ... seconds; while it is away nothing is made up for it. When it
has been away for ``patience`` seconds it is given up and named in ``failed``.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit, urlunsplit

import cv2
import numpy as np

from utils.console import LOGGER
from utils.errors import SourceError
from utils.frames import FALLBACK_FPS, Frame, OpenCapture, Source, frames_per_second, next_frame

FIRST_DELAY, LONGEST_DELAY = 1.0, 30.0  # seconds between attempts to open a lost stream


class StreamReader:
    """Keeps the newest frame of one stream in a thread of its own.

    ``changed`` is notified at each new frame and at the end. ``lost`` tells that the stream was given up.
    Raises SourceError when the stream cannot be opened in the first place.
    """

    def __init__(
        self,
        address: str,
        changed: threading.Condition,
        vid_stride: int = 1,
        patience: float = 60.0,
        open_capture: OpenCapture = cv2.VideoCapture,
        first_delay: float = FIRST_DELAY,
    ) -> None:
        self.label = hide_password(address)
        self.lost = False
        self._target: int | str = int(address) if address.isdigit() else address
        self._changed, self._stride, self._patience = changed, vid_stride, patience
        self._open, self._first_delay = open_capture, first_delay
        self._stop = threading.Event()
        self._newest: tuple[np.ndarray, int] | None = None
        self._count = 0
        self._capture = open_capture(self._target)
        if not self._capture.isOpened():
            self._capture.release()
            raise SourceError(f"{self.label}: cannot be opened; check {_what_to_check(self._target)}")
        self.fps = frames_per_second(self._capture) / vid_stride
        self._thread = threading.Thread(target=self._run, name=f"reader of {self.label}", daemon=True)

    def start(self) -> None:
        """Begin reading."""
        self._thread.start()

    def take(self) -> tuple[np.ndarray, int] | None:
        """The newest frame (uint8 (H, W, 3) RGB) and its number, once; None when there is no newer one."""
        with self._changed:
            newest, self._newest = self._newest, None
        return newest

    @property
    def waiting(self) -> bool:
        """Whether a frame lies ready."""
        return self._newest is not None

    def stop(self) -> None:
        """End the thread and release the device (a read that hangs in the driver is left behind after 2 s)."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)
        elif self._thread.ident is None:  # never started: nobody else will release it
            self._capture.release()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                image = next_frame(self._capture, self._stride)
                if image is not None:
                    self._publish(image)
                elif not self._reopen():
                    return
        finally:
            self._capture.release()
            with self._changed:
                self.lost = not self._stop.is_set()
                self._changed.notify_all()

    def _publish(self, image: np.ndarray) -> None:
        with self._changed:
            self._count += self._stride
            self._newest = (image, self._count)
            self._changed.notify_all()

    def _reopen(self) -> bool:
        LOGGER.warning(f"{self.label}: the stream stopped; trying to reconnect for {self._patience:.0f} s")
        deadline, delay = time.monotonic() + self._patience, self._first_delay
        self._capture.release()
        while not self._stop.wait(min(delay, max(deadline - time.monotonic(), 0.0))):
            self._capture = self._open(self._target)
            image = next_frame(self._capture, self._stride) if self._capture.isOpened() else None
            if image is not None:
                LOGGER.info(f"{self.label}: reconnected")
                self._publish(image)
                return True
            self._capture.release()
            if time.monotonic() >= deadline:
                LOGGER.warning(f"{self.label}: given up after {self._patience:.0f} s without a frame")
                return False
            delay = min(delay * 2, LONGEST_DELAY)
        return False


class StreamSource(Source):
    """One or several streams, newest frames in turn, until all are gone for good or the loop is left."""

    live = True

    def __init__(
        self,
        addresses: Sequence[str],
        vid_stride: int = 1,
        patience: float = 60.0,
        open_capture: OpenCapture = cv2.VideoCapture,
        first_delay: float = FIRST_DELAY,
    ) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self.readers: list[StreamReader] = []
        try:
            for address in addresses:
                self.readers.append(
                    StreamReader(address, self._changed, vid_stride, patience, open_capture, first_delay)
                )
        except SourceError:
            self.close()
            raise
        for reader in self.readers:
            reader.start()

    def __iter__(self) -> Iterator[Frame]:
        names = [file_name(reader.label) for reader in self.readers]
        while True:
            ready = [(i, newest) for i, reader in enumerate(self.readers) if (newest := reader.take()) is not None]
            for i, (image, number) in ready:
                reader = self.readers[i]
                yield Frame(image, reader.label, names[i], "stream", i + 1, len(names), number, 0, reader.fps)
            if ready:
                continue
            with self._changed:
                if any(reader.waiting for reader in self.readers):
                    continue
                if all(reader.lost for reader in self.readers):
                    break
                self._changed.wait(timeout=0.5)  # a timeout, so that Ctrl-C is heard
        self.failed = [reader.label for reader in self.readers if reader.lost]

    def close(self) -> None:
        for reader in self.readers:
            reader.stop()
        self.failed = [reader.label for reader in self.readers if reader.lost]


class ScreenSource(Source):
    """Screenshots: ``[number] [left top width height]`` in pixels; number 0 (default) is all screens together.

    Needs the mss package. Raises SourceError for wrong numbers or when there is no screen.
    """

    live = True

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__()
        if len(words) not in (0, 1, 4, 5) or not all(re.fullmatch(r"-?\d+", w) for w in words):
            raise SourceError("--source screen: expected 'screen [number] [left top width height]', whole numbers")
        numbers = [int(w) for w in words]
        self._number = numbers.pop(0) if len(numbers) in (1, 5) else 0
        try:
            import mss
        except ImportError:
            raise SourceError("--source screen needs the mss package: pip install mss") from None
        try:
            self._grabber = mss.mss()
        except mss.exception.ScreenShotError as error:
            raise SourceError(f"--source screen: no screen to read ({error})") from None
        screens = self._grabber.monitors
        if not 0 <= self._number < len(screens):
            self._grabber.close()
            raise SourceError(f"--source screen {self._number}: there are screens 0 (all) to {len(screens) - 1}")
        area = screens[self._number]
        left, top, width, height = numbers or (0, 0, area["width"], area["height"])
        self._area = {"left": area["left"] + left, "top": area["top"] + top, "width": width, "height": height}

    def __iter__(self) -> Iterator[Frame]:
        name, index = f"screen{self._number}", 0
        while True:
            index += 1
            image = np.ascontiguousarray(np.asarray(self._grabber.grab(self._area))[:, :, 2::-1])  # BGRA -> RGB
            yield Frame(image, name, f"{name}.mp4", "stream", 1, 1, index, 0, FALLBACK_FPS)

    def close(self) -> None:
        self._grabber.close()


def hide_password(address: str) -> str:
    """A URL without its password, for the console and for file names; other text as it is."""
    if "@" not in address or "://" not in address:
        return address
    parts = urlsplit(address)
    user = f"{parts.username}@" if parts.username else ""
    return urlunsplit(parts._replace(netloc=user + parts.netloc.rpartition("@")[2]))


def file_name(label: str) -> str:
    """The name results of a stream are saved under: webcam0.mp4, or the address with plain characters."""
    if label.isdigit():
        return f"webcam{label}.mp4"
    plain = re.sub(r"[^A-Za-z0-9]+", "_", re.sub(r"^\w+://", "", label)).strip("_")
    return f"{plain[:100] or 'stream'}.mp4"


def _what_to_check(target: int | str) -> str:
    if isinstance(target, int):
        return "that a camera has this number and no other program is using it"
    if "youtu" in target:
        return "the address: a YouTube page is no stream, `yt-dlp -g URL` prints one that is"
    return "the address, user and password, and the network"
