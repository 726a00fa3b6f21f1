"""Engines on an NVIDIA GPU. Buffers are torch's, so nothing is copied on the way; the same calls serve both modules."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from deploy.contract import Runtime
from deploy.tensorrt.engine_file import read_engine
from deploy.tensorrt.network import INPUT, OUTPUT
from deploy.tensorrt.plugin_backend import load_plugin
from deploy.tensorrt.trt_backend import MODULES, load_tensorrt, quiet_log, started
from utils.errors import ConfigError, ExportError


class EngineRuntime(Runtime):
    """Takes 1 to ``meta.batch`` images at once, float32."""

    half_input = False

    def __init__(self, path: Path, device: torch.device) -> None:
        meta, maker, engine = read_engine(path)
        super().__init__(meta, path)
        if maker.module not in MODULES:
            raise ExportError(f"{path}: says that {maker.module[:40]!r} built it; known are {', '.join(MODULES)}")
        if device.type != "cuda":
            raise ConfigError(f"{path}: an engine runs on an NVIDIA GPU and --device is {device.type}")
        capability = 10 * torch.cuda.get_device_capability(device)[0] + torch.cuda.get_device_capability(device)[1]
        again = "build it again here with python -m deploy.tensorrt -s"
        if maker.targets and capability not in maker.targets:
            card = f"{torch.cuda.get_device_name(device)} ({capability // 10}.{capability % 10})"
            raise ExportError(f"{path}: {maker.text()}; this is a {card}; {again}")
        trt = load_tensorrt(maker.module)
        self._log, self._device = quiet_log(trt), device
        if maker.plugin:
            load_plugin(trt, path.parent / maker.plugin)
        with torch.cuda.device(device):
            self._runtime = started(trt, "Runtime", self._log)
            self._engine = self._runtime.deserialize_cuda_engine(engine)
            if self._engine is None:
                here = f"{trt.__name__} {trt.__version__}"
                raise ExportError(f"{path}: {maker.text()}; {here} cannot open it ({self._log.last}); {again}")
            self._context = self._engine.create_execution_context()
        if self._context is None:
            raise ExportError(f"{path}: no room to run it ({self._log.last}); build it with a smaller --max-batch")

    def _filled(self, images: Tensor) -> Tensor:
        """Fewer images than the most that it takes need no filling up."""
        return self._decoded(images)

    def run(self, images: Tensor) -> Tensor:
        images = images.to(self._device, torch.float32).contiguous()
        with torch.cuda.device(self._device):
            self._context.set_input_shape(INPUT, tuple(images.shape))
            output = torch.empty(tuple(self._context.get_tensor_shape(OUTPUT)), device=self._device)
            self._context.set_tensor_address(INPUT, images.data_ptr())
            self._context.set_tensor_address(OUTPUT, output.data_ptr())
            if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise ExportError(f"{self.source}: the engine failed ({self._log.last})")
        return output
