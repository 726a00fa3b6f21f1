"""The few operations that a network is described with (network.py), and what a back end has to make of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Pair = tuple[int, int]


@dataclass(frozen=True)
class Map:
    """A tensor of the network: ``handle`` is the back end's own, ``shape`` lacks the batch, which is free."""

    handle: Any
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Steps:
    """Of a convolution, each (rows, columns); ``padding`` is the same on both sides."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def size(self, rows: int, columns: int, kernel: Sequence[int]) -> Pair:
        """Of the map that comes out, floor((H + 2p - d(k-1) - 1)/s) + 1."""
        sides = zip((rows, columns), kernel, self.stride, self.padding, self.dilation)
        height, width = ((side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in sides)
        return height, width


class Backend(ABC):
    """Receives a network operation by operation. Follows shapes and types here, so that the two back ends agree on
    them; the methods with an underscore do the work on handles.

    Types are strict, as in TensorRT from 10 on: what is added or multiplied has one type, a convolution's weights have
    that of its input. Arrays are copied or kept: the caller may forget them.
    """

    has_deform_conv = False
    """Whether :meth:`deform_conv` is there; network.py puts a deformable layer together from GridSample otherwise."""

    @abstractmethod
    def input(self, name: str, shape: tuple[int, ...]) -> Map:
        """A float32 input of ``shape`` behind a free batch."""

    @abstractmethod
    def output(self, x: Map, name: str) -> None:
        """Make ``x`` the output of that name."""

    @abstractmethod
    def finish(self, entries: dict[str, str]) -> bytes:
        """The whole network as a file, with these entries of text inside. Raises ExportError."""

    def constant(self, array: np.ndarray) -> Map:
        """An array whose first axis, of one, stands for the batch."""
        array = np.ascontiguousarray(array)
        assert array.shape[0] == 1
        return Map(self._constant(array), array.shape[1:], array.dtype)

    def conv(self, x: Map, weight: np.ndarray, bias: np.ndarray | None, steps: Steps) -> Map:
        """(C, H, W), weight (O, C/groups, kh, kw), bias (O,) -> (O, H', W')."""
        assert x.shape[0] == weight.shape[1] * steps.groups and x.dtype == weight.dtype, (x, weight.shape, weight.dtype)
        weight, bias = np.ascontiguousarray(weight), None if bias is None else np.ascontiguousarray(bias)
        rows, columns = steps.size(*x.shape[1:], weight.shape[2:])
        return Map(self._conv(x.handle, weight, bias, steps), (weight.shape[0], rows, columns), x.dtype)

    def deform_conv(
        self, x: Map, offset: Map, mask: Map, weight: np.ndarray, bias: np.ndarray | None, steps: Steps
    ) -> Map:
        """x (C, H, W), offset (2*G*K, H', W') in pixels, mask (G*K, H', W'), weight (O, C/groups, kh, kw) float32 ->
        (O, H', W') of x's type. Coordinates are float32 whatever that is."""
        raise NotImplementedError

    def grid_sample(self, x: Map, grid: Map) -> Map:
        """(C, H, W) at grid (H', W', 2), x before y in -1..1 from edge to edge -> (C, H', W'): bilinear, zeros
        outside."""
        assert x.dtype == grid.dtype == np.float32
        return Map(self._grid_sample(x.handle, grid.handle), (x.shape[0], *grid.shape[:2]), x.dtype)

    def sigmoid(self, x: Map) -> Map:
        return Map(self._sigmoid(x.handle), x.shape, x.dtype)

    def add(self, x: Map, y: Map) -> Map:
        return self._joined(self._add, x, y)

    def mul(self, x: Map, y: Map) -> Map:
        return self._joined(self._mul, x, y)

    def _joined(self, operation: Any, x: Map, y: Map) -> Map:
        assert x.dtype == y.dtype and len(x.shape) == len(y.shape), (x, y)
        return Map(operation(x.handle, y.handle), np.broadcast_shapes(x.shape, y.shape), x.dtype)

    def max_pool(self, x: Map, kernel: int) -> Map:
        """Stride 1, and padding that keeps the size, of odd kernels."""
        return Map(self._max_pool(x.handle, kernel), x.shape, x.dtype)

    def upsample(self, x: Map, factor: int) -> Map:
        """(C, H, W) -> (C, H * factor, W * factor): each value repeated."""
        channels, rows, columns = x.shape
        return Map(self._upsample(x.handle, factor), (channels, rows * factor, columns * factor), x.dtype)

    def concat(self, maps: Sequence[Map], axis: int = 0) -> Map:
        """Join along an axis, counted behind the batch."""
        first = maps[0]
        shapes = [[side for number, side in enumerate(x.shape) if number != axis] for x in maps]
        assert all(shape == shapes[0] for shape in shapes) and all(x.dtype == first.dtype for x in maps), maps
        shape = list(first.shape)
        shape[axis] = sum(x.shape[axis] for x in maps)
        return Map(self._concat([x.handle for x in maps], axis + 1), tuple(shape), first.dtype)

    def reshape(self, x: Map, *shape: int) -> Map:
        """The same values with other sides behind the batch, which takes up what is left."""
        return x if shape == x.shape else Map(self._reshape(x.handle, (-1, *shape)), shape, x.dtype)

    def permute(self, x: Map, *order: int) -> Map:
        """Axes in another order, counted behind the batch, which stays the first."""
        handle = self._permute(x.handle, (0, *(axis + 1 for axis in order)))
        return Map(handle, tuple(x.shape[axis] for axis in order), x.dtype)

    def take(self, x: Map, channels: Sequence[int]) -> Map:
        """These channels, in this order."""
        assert max(channels) < x.shape[0]
        return Map(self._take(x.handle, np.array(channels, np.int32)), (len(channels), *x.shape[1:]), x.dtype)

    def cast(self, x: Map, dtype: Any) -> Map:
        dtype = np.dtype(dtype)
        return x if x.dtype == dtype else Map(self._cast(x.handle, dtype), x.shape, dtype)

    @abstractmethod
    def _constant(self, array: np.ndarray) -> Any: ...
    @abstractmethod
    def _conv(self, x: Any, weight: np.ndarray, bias: np.ndarray | None, steps: Steps) -> Any: ...
    @abstractmethod
    def _grid_sample(self, x: Any, grid: Any) -> Any: ...
    @abstractmethod
    def _sigmoid(self, x: Any) -> Any: ...
    @abstractmethod
    def _add(self, x: Any, y: Any) -> Any: ...
    @abstractmethod
    def _mul(self, x: Any, y: Any) -> Any: ...
    @abstractmethod
    def _max_pool(self, x: Any, kernel: int) -> Any: ...
    @abstractmethod
    def _upsample(self, x: Any, factor: int) -> Any: ...
    @abstractmethod
    def _concat(self, maps: list, axis: int) -> Any: ...
    @abstractmethod
    def _reshape(self, x: Any, shape: tuple[int, ...]) -> Any: ...
    @abstractmethod
    def _permute(self, x: Any, order: tuple[int, ...]) -> Any: ...
    @abstractmethod
    def _take(self, x: Any, channels: np.ndarray) -> Any: ...
    @abstractmethod
    def _cast(self, x: Any, dtype: np.dtype) -> Any: ...
