"""Training steps as CUDA graphs: a step of the same shapes is recorded once and replayed as one launch.

A small batch is bound by launching: yolov5s at batch 16 starts some two thousand kernels a step, which takes a CPU
longer than a GPU needs to run them. A replay runs the same kernels on the same addresses, so everything a step reads
and writes has to stay where it is: gradients are set to zero rather than dropped, and the number of targets, which
differs from batch to batch, is rounded up with rows that match nothing (:func:`pad_targets`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.console import LOGGER
from utils.cuda_recording import recording
from utils.gc_pause import collection_paused
from utils.loss import LossParts

MOST_GRAPHS = 24
"""Steps of further shapes are launched kernel by kernel; --multi-scale has some 20."""
FEWEST_ROWS = 128


def pad_targets(targets: Tensor) -> Tensor:
    """targets (T, 6) with rows of zeros up to the next power of two, at least FEWEST_ROWS. A box without width and
    height fits no anchor, so that the loss does not see it."""
    rows = max(FEWEST_ROWS, 1 << max(len(targets) - 1, 0).bit_length())
    return F.pad(targets, (0, 0, 0, rows - len(targets)))


@dataclass(frozen=True)
class _Recorded:
    """A graph with the tensors it reads and those it writes."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    targets: Tensor
    parts: LossParts


class StepGraphs:
    """Forward, loss and backward of a batch, replayed where they can be.

    ``step``: (images, targets) -> LossParts, with the gradients added up in the parameters' ``.grad``; it must not wait
    for the device, and read nothing that changes but its arguments and tensors that change in place.

    Shapes are met three times: the first batch runs as usual, which also compiles and loads its kernels; the second is
    recorded; from then on it is replayed. All of it happens on one stream and in one pool of memory, so that graphs of
    different shapes, of which only one runs at a time, share what their activations need, with each other and with the
    usual steps. What a step or a hook in it keeps for longer must have been allocated before it: a replay writes over
    whatever else lies in the pool.

    Nothing is garbage-collected inside a step: the pool of an earlier learner that goes while another pool is in use
    ends the process (an assertion of torch 2.11's allocator).
    """

    def __init__(self, step: Callable[[Tensor, Tensor], LossParts]) -> None:
        self._recorded: dict[tuple[int, ...], _Recorded] = {}
        self._met: set[tuple[int, ...]] = set()
        self._pool, self._stream = torch.cuda.MemPool(), torch.cuda.Stream()
        # torch ends the process over a pool that goes before its graphs, and where an error's traceback holds both
        # the garbage collector keeps to no order
        weakref.finalize(self, _let_go, self._recorded, [self._pool])
        self._step, self._enabled = step, True

    def __call__(self, images: Tensor, targets: Tensor, usual: bool = False) -> LossParts:
        """One batch, its losses without gradient, valid until the next call. ``usual``: launch kernel by kernel, for
        hooks to see."""
        targets = pad_targets(targets)
        shapes = (*images.shape, len(targets))
        recorded = self._recorded.get(shapes)
        if recorded is None and shapes in self._met and not usual and len(self._recorded) < MOST_GRAPHS:
            recorded = self._record(images, targets)
        self._met.add(shapes)
        if recorded is None or usual:
            return self._usual(images, targets)
        self._recorded[shapes] = recorded
        recorded.images.copy_(images)
        recorded.targets.copy_(targets)
        recorded.graph.replay()
        return recorded.parts

    def _usual(self, images: Tensor, targets: Tensor) -> LossParts:
        """The step launched kernel by kernel, its memory from the pool."""
        if not self._enabled:  # a recording that failed leaves its pool unusable
            return _detached(self._step(images, targets))
        self._stream.wait_stream(torch.cuda.current_stream())
        with collection_paused(), torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool), _one_thread():
            parts = _detached(self._step(images, targets))
        torch.cuda.current_stream().wait_stream(self._stream)
        return parts

    def _record(self, images: Tensor, targets: Tensor) -> _Recorded | None:
        """The step as a graph; nothing runs yet. None, and no further attempt, where something cannot be recorded."""
        if not self._enabled:
            return None
        images, targets = images.clone(), targets.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with collection_paused(), _one_thread(), recording(graph, self._pool.id, self._stream):
                parts = _detached(self._step(images, targets))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            LOGGER.warning(
                f"CUDA graphs: this model's step cannot be recorded and is launched as usual ({reason}); "
                f"--cuda-graphs off saves the attempt and its memory"
            )
            self._enabled = False
            return None
        return _Recorded(graph, images, targets, parts)


def _one_thread() -> AbstractContextManager[None]:
    """Backward in this thread: the pool is the current thread's, and autograd's own would take memory from elsewhere;
    cuDNN's plans are a thread's as well, and making those of one step takes a third of a second."""
    return torch.autograd.set_multithreading_enabled(False)


def _let_go(recorded: dict, pools: list) -> None:
    """The graphs, then the pool that they hold memory of."""
    recorded.clear()
    pools.clear()


def _detached(parts: LossParts) -> LossParts:
    """Without the autograd graph, which would keep its nodes beyond the step."""
    return replace(parts, total=parts.total.detach())
