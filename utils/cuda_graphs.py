"""A function of tensors as CUDA graphs, for inference: a model's forward pass in one launch instead of some two
hundred, a step of NMS in one instead of sixty.

At batch 1 a GPU waits for the CPU that launches its kernels. A graph is of one shape, and making one costs about as
much as three passes launched kernel by kernel, so a shape is recorded when it comes for the third time: the
images of a video or a data set are of few shapes, those of a mixed folder of many that come once.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from utils.console import LOGGER
from utils.cuda_recording import recording

RECORD_AT = 3
"""The first pass of a shape also compiles and loads its kernels; the second tells that it is no single one."""
MOST_SHAPES = 8
"""Graphs kept; the one that was not used for longest makes room. Rectangular validation meets some twenty shapes, but
sorted, one after another."""

Replay = Callable[..., Any]
"""tensors -> the function's output, in memory that the next call writes to again."""


class CudaGraphs:
    """Called like ``function``, a model or another function of CUDA tensors: its output is **valid until the next
    call**, though it may be among the tensors of that call.

    A model must be in eval mode and neither change its modules nor move its weights afterwards; values that change in
    place (an average under training) are followed. Hooks run while a graph is recorded and not when it is replayed.
    ``record``: (function, tensors) -> Replay makes a graph, when a shape comes for the ``record_at``-th time;
    RuntimeError where something in the function cannot be recorded, after one warning it then runs as usual for good.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        record: Callable[..., Replay] | None = None,
        record_at: int = RECORD_AT,
        what: str = "this model",
    ) -> None:
        """``what``: the function's name in that warning."""
        self._function, self._record, self._record_at = function, record or CudaRecorder(), record_at
        self._what = what
        self._graphs: OrderedDict[Hashable, Replay] = OrderedDict()
        self._met: Counter[Hashable] = Counter()
        self._enabled = True

    def __call__(self, *tensors: Tensor) -> Any:
        if not self._enabled:
            return self._function(*tensors)
        kind = tensors[0].device.type
        precision = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        key = (*((tensor.shape, tensor.dtype) for tensor in tensors), precision)
        replay = self._graphs.get(key) or self._new_graph(key, tensors)
        if replay is None:
            return self._function(*tensors)
        self._graphs.move_to_end(key)
        return replay(*tensors)

    def _new_graph(self, key: Hashable, tensors: tuple[Tensor, ...]) -> Replay | None:
        """The shape's graph if it is worth one by now."""
        self._met[key] += 1
        if self._met[key] < self._record_at:
            return None
        self._met[key] = 0  # once it has made room for others, it has to come as often again
        while len(self._graphs) >= MOST_SHAPES:
            self._graphs.popitem(last=False)
        try:
            self._graphs[key] = self._record(self._function, *tensors)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            LOGGER.warning(f"CUDA graphs: {self._what} cannot be recorded and is launched as usual ({reason})")
            self._enabled = False
            self._graphs.clear()
            return None
        return self._graphs[key]


class CudaRecorder:
    """Records with one pool of memory for all shapes: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: tuple[int, int] | None = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, function: Callable[..., Any], *tensors: Tensor) -> Replay:
        """Nothing runs yet. Raises RuntimeError (torch's) for what a graph cannot hold, as waiting for the device."""
        with torch.cuda.device(tensors[0].device), torch.inference_mode(False), torch.no_grad():
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
                # kernels keep the priority of the stream they are recorded on, whichever a graph is replayed on
                self._stream = torch.cuda.Stream(priority=torch.cuda.current_stream().priority)
            held, graph = [tensor.clone() for tensor in tensors], torch.cuda.CUDAGraph()
            with recording(graph, self._pool, self._stream):
                output = function(*held)

        def replay(*tensors: Tensor) -> Any:
            for place, tensor in zip(held, tensors, strict=True):
                if tensor is not place:  # as a function returns that changes it, for the next call
                    place.copy_(tensor)
            graph.replay()
            return output

        return replay
