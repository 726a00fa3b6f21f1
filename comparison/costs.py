"""What models cost: parameters, operations, time to train and to infer, memory."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

SECONDS_A_MODEL = 1.0
"""Inference is timed until each model has had this long, or MOST_PASSES."""

MOST_PASSES = 200
LEAST_PASSES = 5


@dataclass(frozen=True)
class Cost:
    """Of one model. ``train_seconds``: train.py's wall time, a number for each finished seed; ``inference_ms``: the
    forward pass of one image, batch 1, float32, norms folded; ``memory_gb``: the most that a training's log shows, None
    on the CPU; ``gflops`` an image of the comparison's size."""

    params: int
    gflops: float
    train_seconds: tuple[float, ...]
    inference_ms: float
    memory_gb: float | None

    @property
    def train_time(self) -> float:
        """Mean seconds of a training."""
        return statistics.fmean(self.train_seconds)


def time_inference(models: Mapping[str, nn.Module], imgsz: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of the forward pass of one random image, ``imgsz`` pixels square, by model.

    The shortest of many; the models take turns, so that a busy moment of the machine meets all of them. On a CPU one
    thread computes: several wait for each other, and where other programs run that is most of the time.
    """
    import torch

    from models.head import side_multiple

    images, times = {}, {name: [] for name in models}
    for name, model in models.items():
        multiple = side_multiple(model.stride)
        side = -(-imgsz // multiple) * multiple
        image = torch.rand(1, 3, side, side, device=device)
        images[name] = image.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), _one_thread(device):
        for turn in range(MOST_PASSES + 2):
            for name, model in models.items():
                spent = _timed(model, images[name], device)
                if turn >= 2:  # the first passes choose and compile kernels
                    times[name].append(spent)
            spent = [sum(values) for values in times.values()]
            if turn >= LEAST_PASSES + 1 and min(spent) > SECONDS_A_MODEL:
                break
    return {name: 1000 * min(values) for name, values in times.items()}


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timed(model: nn.Module, image: torch.Tensor, device: torch.device) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    model(image)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


_EPOCH_LINE = re.compile(rb"^\s+\d+/\d+\s+([\d.e+-]+)G\s", re.M)


def peak_memory_gb(logs: Sequence[Path]) -> float | None:
    """The largest GPU_mem (units of 1e9 bytes) that the epochs' lines of these logs show; None when it is 0, as on the
    CPU."""
    peak = 0.0
    for log in logs:
        if log.is_file():
            peak = max([peak, *(_number(found) for found in _EPOCH_LINE.findall(log.read_bytes()))])
    return peak or None


def _number(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
