"""Back end for TensorRT's network API: of ``tensorrt``, or of ``tensorrt_rtx`` from the package index, which builds on
machines without a GPU. The two Python modules have the same names in it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from deploy.tensorrt.backend import Backend, Map, Steps
from utils.errors import ConfigError, ExportError, MissingPackage, is_installed

MODULES = ("tensorrt", "tensorrt_rtx")
"""In the order of preference."""
INSTALL = "tensorrt-rtx-cu13 (GeForce RTX and other RTX cards), or tensorrt-cu13"
WORKSPACE = 4 << 30
"""Bytes of GPU memory that tactics may use while an engine is built."""


@dataclass(frozen=True)
class EngineOptions:
    """``batch``: images at once that the engine is tuned for, ``most`` the most it takes; ``targets``: compute
    capabilities, like 86, that a tensorrt_rtx engine is for, empty for those of all cards that it knows."""

    batch: int = 1
    most: int = 8
    targets: tuple[int, ...] = ()


def load_tensorrt(name: str = "") -> ModuleType:
    """The module ``name``, or the first of MODULES that is installed. Raises MissingPackage, ExportError for one that
    cannot be imported."""
    name = name or next((each for each in MODULES if is_installed(each)), "")
    if not name or not is_installed(name):
        raise MissingPackage("an engine" if not name else f"an engine of {name}", INSTALL)
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # bindings without libraries, a driver that is missing
        raise ExportError(f"{name} is installed but does not start ({_first_line(error)})") from error


class TensorRtNetwork(Backend):
    """Handles are ITensors. Deformable layers are put together from GridSample, which is TensorRT's own; with our
    plugin they are built by plugin_backend.py."""

    def __init__(self, trt: ModuleType, options: EngineOptions) -> None:
        self.trt, self.options = trt, options
        self.log = quiet_log(trt)
        self.builder = started(trt, "Builder", self.log)
        # strict types: the only kind from TensorRT 11 on, asked for before that
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self.network = self.builder.create_network(0 if flag is None else 1 << int(flag))
        self._kept: list[np.ndarray] = []  # TensorRT reads weights when it builds

    def input(self, name: str, shape: tuple[int, ...]) -> Map:
        return Map(self.network.add_input(name, self.trt.float32, (-1, *shape)), shape, np.dtype(np.float32))

    def output(self, x: Map, name: str) -> None:
        x.handle.name = name
        self.network.mark_output(x.handle)

    def finish(self, entries: dict[str, str]) -> bytes:
        """The engine as TensorRT serialises it: it has no place for ``entries`` (see engine_file.py)."""
        config = self.config()
        engine = self.builder.build_serialized_network(self.network, config)
        if engine is None:
            raise ExportError(f"{self.trt.__name__} cannot build this network ({self.log.last})")
        return bytes(engine)

    def config(self) -> Any:
        """What TensorRT is to keep to: memory, batches, cards. Raises ConfigError for cards that it does not know."""
        config = self.builder.create_builder_config()
        config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, WORKSPACE)
        config.add_optimization_profile(self.profile())
        self._aim(config)
        return config

    def profile(self) -> Any:
        """The batches that the engine is to take: the least, the one it is tuned for, the most."""
        profile, source = self.builder.create_optimization_profile(), self.network.get_input(0)
        counts = (1, self.options.batch, self.options.most)
        profile.set_shape(source.name, *((count, *tuple(source.shape)[1:]) for count in counts))
        return profile

    def _aim(self, config: Any) -> None:
        """At the cards asked for. TensorRT proper builds for the one that it runs on."""
        known = self._known_targets()
        for target in self.options.targets:
            if target not in known:
                can = f"it knows {', '.join(map(str, sorted(known)))}" if known else "it builds for the GPU it runs on"
                raise ConfigError(f"--arch {target}: {self.trt.__name__} has no such target; {can}")
        if known:
            config.num_compute_capabilities = len(self.targets())
            for number, target in enumerate(self.targets()):
                config.set_compute_capability(known[target], number)

    def targets(self) -> tuple[int, ...]:
        """Compute capabilities of the cards that the engine is for; empty where TensorRT alone knows."""
        return self.options.targets or tuple(sorted(self._known_targets()))

    def _known_targets(self) -> dict[int, Any]:
        known = getattr(self.trt, "ComputeCapability", None)
        members = known.__members__.items() if known is not None else ()
        return {int(name[2:]): value for name, value in members if name.startswith("SM")}

    def _constant(self, array: np.ndarray) -> Any:
        return self._out(self.network.add_constant(array.shape, self._weights(array)))

    def _conv(self, x: Any, weight: np.ndarray, bias: np.ndarray | None, steps: Steps) -> Any:
        arrays = self._weights(weight), self.trt.Weights() if bias is None else self._weights(bias)
        layer = self.network.add_convolution_nd(x, weight.shape[0], weight.shape[2:], *arrays)
        layer.stride_nd, layer.padding_nd, layer.dilation_nd = steps.stride, steps.padding, steps.dilation
        layer.num_groups = steps.groups
        return self._out(layer)

    def _grid_sample(self, x: Any, grid: Any) -> Any:
        layer = self.network.add_grid_sample(x, grid)
        layer.interpolation_mode, layer.sample_mode = self.trt.InterpolationMode.LINEAR, self.trt.SampleMode.FILL
        layer.align_corners = False
        return self._out(layer)

    def _sigmoid(self, x: Any) -> Any:
        return self._out(self.network.add_activation(x, self.trt.ActivationType.SIGMOID))

    def _add(self, x: Any, y: Any) -> Any:
        return self._out(self.network.add_elementwise(x, y, self.trt.ElementWiseOperation.SUM))

    def _mul(self, x: Any, y: Any) -> Any:
        return self._out(self.network.add_elementwise(x, y, self.trt.ElementWiseOperation.PROD))

    def _max_pool(self, x: Any, kernel: int) -> Any:
        layer = self.network.add_pooling_nd(x, self.trt.PoolingType.MAX, (kernel, kernel))
        layer.stride_nd, layer.padding_nd = (1, 1), (kernel // 2, kernel // 2)
        return self._out(layer)

    def _upsample(self, x: Any, factor: int) -> Any:
        layer = self.network.add_resize(x)
        layer.resize_mode, layer.scales = self.trt.InterpolationMode.NEAREST, (1, 1, factor, factor)
        layer.coordinate_transformation = self.trt.ResizeCoordinateTransformation.ASYMMETRIC
        layer.nearest_rounding = self.trt.ResizeRoundMode.FLOOR
        return self._out(layer)

    def _concat(self, maps: list, axis: int) -> Any:
        layer = self.network.add_concatenation(maps)
        layer.axis = axis
        return self._out(layer)

    def _reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        layer = self.network.add_shuffle(x)
        layer.reshape_dims = shape
        return self._out(layer)

    def _permute(self, x: Any, order: tuple[int, ...]) -> Any:
        layer = self.network.add_shuffle(x)
        layer.first_transpose = self.trt.Permutation(order)
        return self._out(layer)

    def _take(self, x: Any, channels: np.ndarray) -> Any:
        return self._out(self.network.add_gather(x, self._constant(channels), 1))

    def _cast(self, x: Any, dtype: np.dtype) -> Any:
        kind = {"float32": self.trt.float32, "float16": self.trt.float16}[dtype.name]
        return self._out(self.network.add_cast(x, kind))

    def _weights(self, array: np.ndarray) -> Any:
        self._kept.append(array)
        return self.trt.Weights(array)

    def _out(self, layer: Any) -> Any:
        """The only output of a layer. Raises ExportError where TensorRT refused to add it."""
        if layer is None:
            raise ExportError(f"{self.trt.__name__} refuses a layer of this network ({self.log.last})")
        return layer.get_output(0)


def started(trt: ModuleType, part: str, log: Any) -> Any:
    """``trt.Builder`` or ``trt.Runtime``. Raises ExportError where TensorRT finds no GPU or driver that it needs."""
    try:
        return getattr(trt, part)(log)
    except (TypeError, RuntimeError) as error:  # TypeError: its way of saying that it got nothing
        raise ExportError(f"{trt.__name__} cannot start its {part} here ({log.last})") from error


def quiet_log(trt: ModuleType) -> Any:
    """A logger that keeps the last error, ``last``, for a line of our own instead of printing pages."""
    serious = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

    class Log(trt.ILogger):
        last = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity in serious:
                self.last = message.splitlines()[0][:300]

    return Log()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
