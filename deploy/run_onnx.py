"""ONNX files in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from deploy.contract import Runtime
from deploy.metadata import parse
from utils.console import LOGGER
from utils.errors import ExportError


class OnnxRuntime(Runtime):
    """On CUDA where onnxruntime-gpu is installed, else on the CPU."""

    def __init__(self, path: Path, device: torch.device) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(path, options, providers=_providers(device))
        except Exception as error:  # its exceptions have no common base
            reason = with_advice(str(error).strip().splitlines()[0][:200])
            raise ExportError(f"{path}: ONNX Runtime cannot open it ({reason})") from error
        super().__init__(parse(session.get_modelmeta().custom_metadata_map, str(path)), path)
        self._session, self._input = session, session.get_inputs()[0].name

    def run(self, images: Tensor) -> Tensor:
        (output, *_) = self._session.run(None, {self._input: images.cpu().contiguous().numpy()})
        return torch.from_numpy(output)


def with_advice(reason: str) -> str:
    """ONNX Runtime's reason, and what to do where it has no DeformConv, as 1.20 has none."""
    return f"{reason}; a newer onnxruntime has it, or --dcn gridsample" if "DeformConv" in reason else reason


def _providers(device: torch.device) -> list:
    if device.type != "cuda":
        return ["CPUExecutionProvider"]
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        LOGGER.warning("this onnxruntime has no CUDA: running on the CPU (pip install onnxruntime-gpu)")
        return ["CPUExecutionProvider"]
    return [("CUDAExecutionProvider", {"device_id": device.index or 0}), "CPUExecutionProvider"]
