"""ncnn's files on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deploy.contract import Runtime
from deploy.metadata import parse
from deploy.to_ncnn import ANCHORS, BIN, ENTRIES, PARAM
from deploy.wrap import decode_raw
from utils.console import LOGGER
from utils.errors import ExportError

MAX_ENTRIES = 10_000_000


class NcnnRuntime(Runtime):
    """A folder *_ncnn_model, one image at a time."""

    half_input = False

    def __init__(self, path: Path, device: torch.device) -> None:
        import ncnn

        if device.type != "cpu":
            LOGGER.warning(f"{path}: ncnn runs on the CPU here, not on {device.type}")
        for name in (PARAM, BIN, ENTRIES):
            if not (path / name).is_file():
                raise ExportError(f"{path}: has no {name}; export it again")
        entries = _entries(path / ENTRIES)
        super().__init__(parse(entries, str(path / ENTRIES)), path)
        self._anchors = _anchors(entries, len(self.meta.strides), str(path / ENTRIES))
        self._net = ncnn.Net()
        self._net.opt.use_fp16_packed = self._net.opt.use_fp16_storage = self._net.opt.use_fp16_arithmetic = False
        self._net.opt.num_threads = torch.get_num_threads()
        if self._net.load_param(str(path / PARAM)) or self._net.load_model(str(path / BIN)):
            raise ExportError(f"{path}: ncnn cannot open it; export it again")

    def run(self, images: Tensor) -> Tensor:
        import ncnn

        extractor = self._net.create_extractor()
        # the array must live as long as the Mat: ncnn does not copy it
        pixels = np.ascontiguousarray(images[0].float().cpu().numpy())
        extractor.input("in0", ncnn.Mat(pixels))
        levels = []
        for number in range(len(self.meta.strides)):
            status, output = extractor.extract(f"out{number}")
            if status:
                raise ExportError(f"{self.source}: ncnn could not run it (status {status})")
            levels.append(torch.from_numpy(np.array(output)).float()[None])
        return decode_raw(levels, self._anchors, self.meta.strides)


def _entries(file: Path) -> dict:
    try:
        if file.stat().st_size > MAX_ENTRIES:
            raise ValueError
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ExportError(f"{file}: damaged; export the model again") from None
    return found if isinstance(found, dict) else {}


def _anchors(entries: dict, levels: int, source: str) -> Tensor:
    """(nl, A, 2) pixels."""
    try:
        anchors = torch.tensor(json.loads(entries[ANCHORS]), dtype=torch.float32).view(levels, -1, 2)
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError):
        raise ExportError(f"{source}: its anchors cannot be; export the model again") from None
    return anchors
