"""A package that is opened and run in a process of its own, whatever becomes of that; for export.py's comparison."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deploy.contract import Runtime
from deploy.crash_guard import try_package
from deploy.metadata import parse
from deploy.run_torch import read_metadata
from utils.errors import ExportError

INSTEAD = "nothing is written: use --include onnx or torchscript, or --device cpu"


class ApartRuntime(Runtime):
    """As AotiRuntime, at the price of a new process for every call. Raises ExportError where that dies."""

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__(parse(read_metadata(path), str(path)), path)
        self._device = device

    def run(self, images: Tensor) -> Tensor:
        with tempfile.TemporaryDirectory(prefix="export-") as folder:
            given, found = Path(folder) / "images.npy", Path(folder) / "output.npy"
            np.save(given, images.cpu().numpy())
            trial = try_package(self.source, self._device, given, found)
            if trial.grief or trial.error:
                raise ExportError(f"compiled, but {trial.grief or trial.error}; {INSTEAD}")
            return torch.from_numpy(np.load(found))
