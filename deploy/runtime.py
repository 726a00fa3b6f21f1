"""Open what --weights names: an exported file of any format, or a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from deploy.contract import Runtime
from deploy.formats import format_of
from models.loading import load_model
from utils.errors import ConfigError, ExportError, MissingPackage


def open_model(weights: Sequence[str], device: torch.device, cfg: str = "") -> nn.Module:
    """What --weights names, ready for inference on ``device``: an exported file, a checkpoint, or several checkpoints
    as an ensemble. ``cfg``: the model YAML of a file that holds tensors only.

    Raises ConfigError for combinations that cannot be; CheckpointError, ExportError, MissingPackage.
    """
    exported = [path for path in weights if format_of(path)]
    if not exported:
        return load_model(weights if len(weights) > 1 else weights[0], device, fuse=True, cfg=cfg or None)
    if len(weights) > 1:
        raise ConfigError(f"--weights {exported[0]}: only checkpoints make an ensemble; give exported files one by one")
    if cfg:
        raise ConfigError(f"--cfg: {exported[0]} holds its own layers; leave it out")
    return open_runtime(exported[0], device)


def open_runtime(path: str | Path, device: torch.device | str = "cpu") -> Runtime:
    """The file (or folder) of a format of deploy/formats.py, ready on ``device``.

    TorchScript and .pt2 files hold programs: open only those you made or trust (docs/security.md). Raises
    MissingPackage, ExportError for a file that is damaged or not of export.py, ConfigError for a device the format has
    no use for.
    """
    path, device = Path(path), torch.device(device)
    kind = format_of(path)
    if kind is None:
        raise ExportError(f"{path}: not the name of an exported model (see export.py --list)")
    if kind.planned:
        raise ExportError(f"{path}: {kind.name} files are not run here yet (see export.py --list)")
    if kind.missing():
        raise MissingPackage(str(path), kind.missing())
    if not path.exists():
        raise ExportError(f"{path}: no such file or folder")
    return _opener(kind.name)(path, device)


def _opener(name: str) -> type[Runtime]:
    """The class for a format; each is in a module that imports its package."""
    if name == "onnx":
        from deploy.run_onnx import OnnxRuntime

        return OnnxRuntime
    if name == "openvino":
        from deploy.run_openvino import OpenVinoRuntime

        return OpenVinoRuntime
    if name == "ncnn":
        from deploy.run_ncnn import NcnnRuntime

        return NcnnRuntime
    if name == "engine":
        from deploy.tensorrt.run_engine import EngineRuntime

        return EngineRuntime
    from deploy.run_torch import AotiRuntime, TorchScriptRuntime

    return {"torchscript": TorchScriptRuntime, "aoti": AotiRuntime}[name]
