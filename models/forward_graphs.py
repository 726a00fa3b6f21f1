"""A model's forward pass as CUDA graphs, for inference: one launch instead of some two hundred.

At batch 1 a GPU waits for the CPU that launches its kernels. A graph is of one shape, and making one costs about as
much as three passes launched kernel by kernel, so a shape is recorded when it comes for the RECORD_AT-th time: the
images of a video or a data set are of few shapes, those of a mixed folder of many that come once.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from utils.console import LOGGER
from utils.cuda_recording import recording

RECORD_AT = 3
"""The first pass of a shape also compiles and loads its kernels; the second tells that it is no single one."""
MOST_SHAPES = 8
"""Graphs kept; the one that was not used for longest makes room. Rectangular validation meets some twenty shapes, but
sorted, one after another."""

Replay = Callable[[Tensor], Any]
"""images -> the model's output, in memory that the next call writes to again."""


class ForwardGraphs:
    """Called like the model: images (B, 3, H, W) -> its output, **valid until the next call**.

    The model must be in eval mode, on a CUDA device, and neither change its modules nor move its weights afterwards;
    values that change in place (an average under training) are followed. Hooks run while a graph is recorded and not
    when it is replayed. ``record``: (model, images) -> Replay makes a graph; RuntimeError where something in the model
    cannot be recorded, after one warning it then runs as usual for good.
    """

    def __init__(self, model: nn.Module, record: Callable[[nn.Module, Tensor], Replay] | None = None) -> None:
        self._model, self._record = model, record or CudaRecorder()
        self._graphs: OrderedDict[Hashable, Replay] = OrderedDict()
        self._met: Counter[Hashable] = Counter()
        self._enabled = True

    def __call__(self, images: Tensor) -> Any:
        if not self._enabled:
            return self._model(images)
        kind = images.device.type
        key = (images.shape, images.dtype, torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind))
        replay = self._graphs.get(key) or self._new_graph(key, images)
        if replay is None:
            return self._model(images)
        self._graphs.move_to_end(key)
        return replay(images)

    def _new_graph(self, key: Hashable, images: Tensor) -> Replay | None:
        """The shape's graph if it is worth one by now."""
        self._met[key] += 1
        if self._met[key] < RECORD_AT:
            return None
        self._met[key] = 0  # once it has made room for others, it has to come as often again
        while len(self._graphs) >= MOST_SHAPES:
            self._graphs.popitem(last=False)
        try:
            self._graphs[key] = self._record(self._model, images)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            LOGGER.warning(f"CUDA graphs: this model cannot be recorded and is launched as usual ({reason})")
            self._enabled = False
            self._graphs.clear()
            return None
        return self._graphs[key]


class CudaRecorder:
    """Records with one pool of memory for all shapes: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: tuple[int, int] | None = None

    def __call__(self, model: nn.Module, images: Tensor) -> Replay:
        """Nothing runs yet. Raises RuntimeError (torch's) for what a graph cannot hold, as waiting for the device."""
        with torch.cuda.device(images.device), torch.inference_mode(False), torch.no_grad():
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            held, graph = images.clone(), torch.cuda.CUDAGraph()
            with recording(graph, self._pool):
                output = model(held)

        def replay(images: Tensor) -> Any:
            held.copy_(images)
            graph.replay()
            return output

        return replay
