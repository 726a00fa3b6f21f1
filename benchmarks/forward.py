"""How long a model's forward pass takes, for the benchmarks that ask."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from utils.cuda_graphs import RECORD_AT, CudaGraphs

ROUNDS = 5


@torch.inference_mode()
def forward_ms(model: nn.Module, count: int, size: tuple[int, int], device: torch.device) -> float:
    """Milliseconds of a pass of ``count`` images of ``size`` (height, width), in the model's dtype, channels last; on a
    GPU replayed as a CUDA graph. Median over ROUNDS of the mean."""
    cuda, dtype = device.type == "cuda", next(model.parameters()).dtype
    images = torch.rand(count, 3, *size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    forward: Callable = CudaGraphs(model) if cuda else model
    synchronize, passes = (torch.cuda.synchronize, 50) if cuda else ((lambda: None), 1)
    for _ in range(RECORD_AT + 2 if cuda else 1):
        forward(images)
    times = []
    for _ in range(ROUNDS):
        synchronize()
        start = time.perf_counter()
        for _ in range(passes):
            forward(images)
        synchronize()
        times.append((time.perf_counter() - start) / passes * 1e3)
    return statistics.median(times)
