"""OpenVINO's IR on the CPU."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from deploy.contract import Runtime
from deploy.metadata import Metadata, parse
from deploy.to_openvino import SECTION
from utils.console import LOGGER
from utils.errors import ExportError


class OpenVinoRuntime(Runtime):
    """A folder *_openvino_model. Other devices of OpenVINO are for programs that use it directly."""

    half_input = False

    def __init__(self, path: Path, device: torch.device) -> None:
        import openvino

        if device.type != "cpu":
            LOGGER.warning(f"{path}: OpenVINO runs on the CPU here, not on {device.type}")
        files = sorted(path.glob("*.xml")) if path.is_dir() else []
        if len(files) != 1:
            raise ExportError(f"{path}: expected a folder with one .xml and its .bin, found {len(files)} .xml files")
        try:
            model = openvino.Core().read_model(files[0])
            settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                        "INFERENCE_PRECISION_HINT": "f32"}  # fmt: skip
            compiled = openvino.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1][:200]
            raise ExportError(f"{files[0]}: OpenVINO cannot open it ({reason})") from error
        super().__init__(_metadata(model, files[0]), path)
        self._compiled = compiled

    def run(self, images: Tensor) -> Tensor:
        output = self._compiled(images.float().cpu().contiguous().numpy())
        return torch.from_numpy(output[0].copy())


def _metadata(model, file: Path) -> Metadata:
    names = (name for name in Metadata.__dataclass_fields__ if model.has_rt_info([SECTION, name]))
    return parse({name: model.get_rt_info([SECTION, name]).astype(str) for name in names}, str(file))
