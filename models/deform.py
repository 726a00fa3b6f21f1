"""Plain convolutions made deformable with their weights kept: ``--dcn LAYERS``.

A DCN whose offsets are zero samples where the convolution does, with mask sigmoid(0) = 1/2. So its weight is twice the
convolution's: both factors are powers of two, every product is the same float as before, and the output is bit for bit
what the deformable operator gives for the convolution's own weight with mask 1. The norm and the activation stay.

What was converted is written into the model's description (``model.yaml["dcn"]``, a list of paths), so that a
checkpoint rebuilds its model by itself. ``dcn_options`` there (models.spec.DCN_OPTIONS) says what kind of DCN they are.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from models.common import DCN, Conv, DCNConv
from utils.errors import ConfigError

FORMS = (
    "a layer number, c3:N (the 3x3 convolutions inside layer N), c3:N/K (every K-th of them, the last included), "
    "backbone.lastN, or all3x3; several with commas"
)
"""What a request may say."""


def make_deformable(model: nn.Module, requests: Sequence[str | int], where: str = "--dcn") -> list[str]:
    """Turn the Convs that ``requests`` name into DCNConvs, in place; the model's output stays what it is.

    ``model`` is a DetectionModel (``model``, ``layers``, ``yaml``). A request is one of FORMS or a path below
    ``model.model`` as this function returns them: ``5``, ``8.m.0.cv2``. Returns the paths converted now, in the
    model's order; ``model.yaml["dcn"]`` and the type in ``model.layers`` tell of them too. Everything is checked
    first: ConfigError, beginning with ``where``, for a request that is not understood, a layer that is not there, is
    no convolution, is 1x1, is deformable already or has lost its norm to fusing.
    """
    modules = dict(model.model.named_modules())
    wanted = dict.fromkeys(path for request in requests for path in _paths(model, str(request).strip(), where))
    for path in wanted:
        _check(path, modules[path], where)
    paths = [path for path in modules if path in wanted]
    options = model.yaml.get("dcn_options") or {}
    made = {path: _made(modules[path], options, f"{where} {path}") for path in paths}
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(modules[parent], name, made[path])
    model.yaml["dcn"] = [*model.yaml.get("dcn", ()), *paths]
    for index in {int(path.split(".")[0]) for path in paths}:
        _describe(model, index)
    return paths


def factor_between(name: str, source: Container[str], target: Container[str]) -> float:
    """By what the entry ``name`` of a state dict changes on its way from one model into another, given the names of
    both: a DCN's weight is twice that of the convolution whose place it takes. 1 for everything else."""
    stem, _, last = name.rpartition(".")
    if last != "weight":
        return 1.0
    deformable_before, deformable_after = (_has_branch(stem, names) for names in (source, target))
    if deformable_before == deformable_after:
        return 1.0
    return 2.0 if deformable_after else 0.5


def _has_branch(stem: str, names: Container[str]) -> bool:
    return any(f"{stem}.conv_offset_mask.{weight}" in names for weight in ("weight", "pointwise.weight"))


def parse_requests(text: str) -> list[str]:
    """``"1,3, c3:8"`` as its parts; an empty text has none."""
    return [part for part in (piece.strip() for piece in text.split(",")) if part]


def _paths(model: nn.Module, request: str, where: str) -> list[str]:
    """The Convs that one request means."""
    if request == "all3x3":
        return _named(where, request, _convs_3x3(model.model), "the model has no 3x3 convolution that is not DCN yet")
    if last := re.fullmatch(r"backbone\.last(\d{1,9})", request):
        return _last_of_backbone(model, int(last[1]), where)
    if inside := re.fullmatch(r"[cC]3:(\d{1,9})(?:/([1-9]\d{0,8}))?", request):
        return _inside(model, int(inside[1]), where)[:: -int(inside[2] or 1)]
    if re.fullmatch(r"\d{1,9}", request):
        return _layer(model, int(request), where)
    if re.fullmatch(r"\d+(\.\w+)+", request):
        if request not in dict(model.model.named_modules()):
            raise ConfigError(f"{where} {request}: the model has no such part")
        return [request]
    raise ConfigError(f"{where} {request!r}: not understood; give {FORMS}")


def _layer(model: nn.Module, index: int, where: str) -> list[str]:
    """A whole layer: a Conv, or the Convs of a repeated one."""
    module = _module(model, index, where)
    if type(module) is nn.Sequential:
        return [f"{index}.{name}" for name, _ in module.named_children()]
    return [str(index)]


def _inside(model: nn.Module, index: int, where: str) -> list[str]:
    """The 3x3 Convs within a block."""
    module = _module(model, index, where)
    if isinstance(module, (Conv, DCN, DCNConv)):
        raise ConfigError(f"{where} c3:{index}: layer {index} is a single {type(module).__name__}; write {index}")
    kind = type(module).__name__
    if any(isinstance(part, DCN) for part in module.modules()) and not _convs_3x3(module):
        raise ConfigError(f"{where} c3:{index}: the 3x3 convolutions of layer {index} ({kind}) are DCN already")
    found = [f"{index}.{path}" for path in _convs_3x3(module)]
    return _named(where, f"c3:{index}", found, f"layer {index} ({kind}) has no 3x3 convolution")


def _last_of_backbone(model: nn.Module, count: int, where: str) -> list[str]:
    """The last ``count`` Conv layers of the backbone that are larger than 1x1."""
    rows = range(len(model.yaml["backbone"]))
    found = [str(i) for i in rows if isinstance(model.model[i], Conv) and max(model.model[i].conv.kernel_size) > 1]
    if not 1 <= count <= len(found):
        raise ConfigError(
            f"{where} backbone.last{count}: the backbone has {len(found)} Conv layers larger than 1x1"
            + (f" ({', '.join(found)})" if found else "; c3:N reaches those inside a block")
        )
    return found[-count:]


def _named(where: str, request: str, paths: list[str], otherwise: str) -> list[str]:
    if not paths:
        raise ConfigError(f"{where} {request}: {otherwise}")
    return paths


def _module(model: nn.Module, index: int, where: str) -> nn.Module:
    if index >= len(model.model):
        raise ConfigError(f"{where} {index}: the model has layers 0..{len(model.model) - 1}")
    return model.model[index]


def _convs_3x3(root: nn.Module) -> list[str]:
    return [p for p, m in root.named_modules() if isinstance(m, Conv) and m.conv.kernel_size == (3, 3)]


def _check(path: str, module: nn.Module, where: str) -> None:
    index, kind = path.split(".")[0], type(module).__name__
    if isinstance(module, (DCN, DCNConv)):
        raise ConfigError(f"{where} {path}: it is a {kind} already")
    if not isinstance(module, Conv):
        blocks = any(True for _ in _convs_3x3(module))
        hint = f"; c3:{index} takes the 3x3 convolutions inside it" if blocks and path == index else ""
        raise ConfigError(f"{where} {path}: it is a {kind}, not a Conv{hint}")
    if max(module.conv.kernel_size) == 1:
        raise ConfigError(f"{where} {path}: it is a 1x1 convolution, whose single tap has nothing to deform")
    if not isinstance(module.bn, nn.BatchNorm2d):
        raise ConfigError(
            f"{where} {path}: its norm was folded into the convolution, for inference; load the model with fuse=False"
        )


def _made(block: Conv, options: Mapping[str, Any], where: str) -> DCNConv:
    try:
        return _deformable(block, options)
    except ValueError as error:  # of options that do not fit the convolution
        raise ConfigError(f"{where}: dcn_options: {error}") from None


@torch.no_grad()
def _deformable(block: Conv, options: Mapping[str, Any]) -> DCNConv:
    """A DCNConv with the same output, of the same dtype, device and mode; the norm and activation are the block's."""
    conv = block.conv
    c2, _, *kernel = conv.weight.shape
    steps = conv.stride, conv.padding, conv.dilation, conv.groups
    made = DCNConv(conv.in_channels, c2, tuple(kernel), *steps, **options)
    made.to(conv.weight.device, conv.weight.dtype)
    made.conv.weight.copy_(conv.weight * 2)
    made.requires_grad_(conv.weight.requires_grad)
    made.bn, made.act = block.bn, block.act
    for name in ("i", "f", "type", "np"):  # what models.parser notes on a layer
        if hasattr(block, name):
            setattr(made, name, getattr(block, name))
    return made.train(block.training)


def _describe(model: nn.Module, index: int) -> None:
    """Tell of a layer's new kind where its table row comes from."""
    module = model.model[index]
    inside = [path for path in model.yaml["dcn"] if path.startswith(f"{index}.")]
    kind = f"{DCNConv.__module__}.{DCNConv.__name__}"
    if inside:
        kind = f"{model.layers[index].type.partition(',')[0]}, {len(inside)} now DCN"
    model.layers[index] = replace(model.layers[index], type=kind)
    module.type, module.np = kind, sum(p.numel() for p in module.parameters())
