"""A model as a folder for ncnn, through pnnx. Batch 1, one size; the boxes are decoded outside the file."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from deploy.metadata import Metadata
from deploy.wrap import ExportModel, RawModel, quiet
from utils.errors import ExportError
from utils.files import atomic_write

PARAM, BIN, ENTRIES = "model.ncnn.param", "model.ncnn.bin", "metadata.json"
ANCHORS = "anchors"
"""Entry of ENTRIES beside those of Metadata: per level the pairs w, h in pixels."""
MAX_SECONDS = 1800


def export_ncnn(model: ExportModel, example: Tensor, folder: Path, meta: Metadata) -> None:
    """Write ``folder`` with PARAM, BIN and ENTRIES.

    For one image of one size. Raises ExportError when pnnx fails.
    """
    import pnnx

    anchors = model.model.detect.anchors * model.model.detect.stride.view(-1, 1, 1)
    folder.mkdir()
    with quiet(), torch.no_grad():
        torch.jit.trace(RawModel(model), example, check_trace=False).save(str(folder / "model.pt"))
    shape = "[" + ",".join(map(str, example.shape)) + "]"
    command = [pnnx.EXEC_PATH, "model.pt", f"inputshape={shape}", f"fp16={int(meta.half)}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=MAX_SECONDS, check=False)
    if done.returncode or not (folder / PARAM).is_file():
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise ExportError(f"pnnx failed with status {done.returncode} ({last[:200]})")
    for file in set(folder.iterdir()) - {folder / PARAM, folder / BIN}:  # its scripts and its own format
        file.unlink()
    entries = {**meta.entries(), ANCHORS: json.dumps(anchors.flatten(1).tolist())}
    atomic_write(folder / ENTRIES, json.dumps(entries, indent=1))
