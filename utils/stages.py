"""How long the stages of detection take: measured, and told in the familiar line."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

STAGES = ("pre-process", "inference", "NMS")
"""From uint8 images on the host to decoded predictions to detections."""


class StageTimes:
    """Time of each named stage. On CUDA, events in the stream are read at the end, so that measuring waits for
    nothing; elsewhere the clock is read."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to stage ``name``."""
        self._seconds[name] += 0.0  # stages are reported in the order they first ran
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(torch.cuda.current_stream(self._device))
            yield
            end.record(torch.cuda.current_stream(self._device))
            self._events.append((name, start, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - begin

    def add(self, name: str, seconds: float) -> None:
        """Add seconds of the clock to stage ``name``: of work that another thread did."""
        self._seconds[name] += seconds

    def per_image(self, images: int) -> dict[str, float]:
        """Milliseconds an image of each stage, in the order they first ran."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1000
        self._events.clear()
        return {name: 1000 * seconds / max(images, 1) for name, seconds in self._seconds.items()}


def speed_line(milliseconds: Mapping[str, float], shape: tuple[int, ...]) -> str:
    """``Speed: 0.2ms pre-process, 5.1ms inference, 1.0ms NMS per image at shape (1, 3, 640, 640)``.

    ``milliseconds`` an image by stage; ``shape`` (B, C, H, W) of the network input.
    """
    stages = ", ".join(f"{value:.1f}ms {stage}" for stage, value in milliseconds.items())
    return f"Speed: {stages} per image at shape {tuple(shape)}"
