"""A model as .wts, with every name that tensorrtx's YOLOv5 programs and the article's ask for."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from deploy.metadata import Metadata
from models.common import DCN
from models.yolo import DetectionModel
from utils.console import LOGGER
from utils.errors import ExportError
from utils.wts import read_wts, write_wts

BN_EPS = 1e-3
"""Not in the file: readers have it built in, so that a model with another one would be silently wrong."""
READERS_KNOW = ("Conv", "C3", "SPPF", "Upsample", "Concat", "Detect", "DCN")
"""Layers of the networks that tensorrtx and the article build."""


def wts_tensors(model: DetectionModel) -> dict[str, Tensor]:
    """Name -> tensor: the state dict of an unfused model, and Detect's ``anchor_grid`` (levels * anchors * 2 values,
    pixels) and ``strides`` (levels,), which readers ask for.

    A missing name is no error in tensorrtx, it builds garbage; so what cannot be complete is refused here: ExportError
    for a model with folded norms or norms of another eps.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Identity) and name.endswith(".bn"):
            raise ExportError(f"{name}: is folded into its convolution; .wts readers fold it themselves")
        if isinstance(module, nn.BatchNorm2d) and abs(module.eps - BN_EPS) > 1e-9:
            raise ExportError(f"{name}: has eps {module.eps:g}, but .wts readers compute with {BN_EPS:g}")
    detect = f"model.{len(model.model) - 1}"
    pixels = model.detect.anchors.float() * model.stride.view(-1, 1, 1)
    return {**model.state_dict(), f"{detect}.anchor_grid": pixels, f"{detect}.strides": model.stride}


def unknown_to_readers(model: DetectionModel) -> list[str]:
    """Kinds of layers in the model that no reader's network has; a DCN inside a block or with options among them."""
    unknown = {type(layer).__name__ for layer in model.model} - set(READERS_KNOW)
    for layer in model.model:
        inside = [module for module in layer.modules() if isinstance(module, DCN)]
        if inside and not isinstance(layer, DCN) and type(layer).__name__ in READERS_KNOW:
            unknown.add(f"{type(layer).__name__} with DCN inside")
        if any(dcn.offset_groups > 1 or type(dcn.conv_offset_mask) is not nn.Conv2d for dcn in inside):
            unknown.add("DCN with options")
    return sorted(unknown)


def export_wts(model: DetectionModel, path: Path, meta: Metadata | None) -> int:
    """Write the model, unfused and in eval mode; returns the size in bytes. ``meta``: None for nothing but tensors.

    Raises ExportError as :func:`wts_tensors`, OSError.
    """
    unknown = unknown_to_readers(model)
    if unknown:
        LOGGER.warning(f"{path.name}: tensorrtx has no {', '.join(unknown)}; --weights {path.name} here reads them")
    described = None if meta is None else {"yaml": model.yaml, "nc": model.nc, **asdict(meta)}
    return write_wts(path, wts_tensors(model), described)


def compare_wts(model: DetectionModel, path: Path) -> None:
    """Read the file back. Raises ExportError unless every tensor of the model is in it, to the bit (as float32)."""
    read, _ = read_wts(path)
    for name, tensor in wts_tensors(model).items():
        value = tensor.detach().cpu().float().reshape(-1)
        if name not in read or not torch.equal(value.view(torch.int32), read[name].view(torch.int32)):
            raise ExportError(f"{path}: {name} was read back with other values")
