"""Changes to a built model: fold norms into convolutions, freeze layers, choose the kernels of DCN layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.common import DCN, Conv, DCNConv
from models.head import Detect
from models.ops.deform_conv import backend_for, obstacle_to
from utils.console import LOGGER, plural
from utils.errors import ConfigError


@torch.no_grad()
def fuse(model: nn.Module) -> nn.Module:
    """Fold the norm of every Conv and DCNConv into its convolution, in place; for inference. Returns the model.

    ``bn`` becomes an Identity, so the same forward runs; the keys conv.weight and conv.bias remain. The SiLU of a
    DCNConv moves into its DCN, whose fused kernel applies it before it writes. Parameters no longer ask for gradients,
    as the folded norms cannot be trained. Calling it again changes nothing.
    """
    for module in model.modules():
        if isinstance(module, (Conv, DCNConv)) and isinstance(module.bn, nn.BatchNorm2d):
            weight, bias = _folded(module.conv.weight, module.conv.bias, module.bn)
            module.conv.weight.copy_(weight)
            module.conv.bias = nn.Parameter(bias)
            module.bn = nn.Identity()
            if isinstance(module, DCNConv) and isinstance(module.act, nn.SiLU):
                module.conv.silu, module.act = True, nn.Identity()
    return model.requires_grad_(False)


def _folded(weight: Tensor, bias: Tensor | None, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight (Cout, ...) and bias (Cout,) of conv -> bn at its running statistics, computed in float64.

    W' = W * gamma / sqrt(var + eps), b' = beta + (b - mean) * gamma / sqrt(var + eps). A convolution is linear in its
    weight wherever it samples, so this holds for a deformable one too.
    """
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    start = bias.double() if bias is not None else torch.zeros_like(scale)
    folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    return folded.to(weight.dtype), (bn.bias.double() + (start - bn.running_mean.double()) * scale).to(weight.dtype)


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` in ``dtype``, in place, but for the anchors of its heads: decoding is in float32, and bfloat16 would
    round them by up to 0.4 %. Returns the model."""
    heads = [module for module in model.modules() if isinstance(module, Detect)]
    kept = [(head.anchors.float(), head.stride.float()) for head in heads]
    model.to(dtype)
    for head, (anchors, stride) in zip(heads, kept, strict=True):
        head.anchors, head.stride = anchors, stride
    return model


def freeze(model: nn.Module, layers: Iterable[int]) -> list[str]:
    """Stop the gradients of these layers and start those of all others; returns the names of the frozen parameters.

    ``layers`` are numbers of the model's table (``model.<number>.``). Their BatchNorm statistics still follow the
    data, as in YOLOv5: a frozen layer keeps its weights, not its outputs. Raises ConfigError for a number that the
    model does not have.
    """
    wanted = sorted(set(layers))
    missing = [number for number in wanted if not 0 <= number < len(model.model)]
    if missing:
        raise ConfigError(f"--freeze: there is no layer {missing[-1]}, the model has layers 0..{len(model.model) - 1}")
    prefixes = tuple(f"model.{number}." for number in wanted)
    frozen = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith(prefixes)
        if not parameter.requires_grad:
            frozen.append(name)
    return frozen


def set_dcn_backend(model: nn.Module, name: str) -> int:
    """Make every DCN in ``model`` (also inside DCNConv, C3DCN, an Ensemble) use the kernels ``name``, one of
    models.ops.deform_conv.BACKENDS. Returns how many there are. Copies of the model keep the choice; a state dict does
    not hold it."""
    layers = [module for module in model.modules() if isinstance(module, DCN)]
    for layer in layers:
        layer.backend = name
    return len(layers)


def use_dcn_backend(model: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """:func:`set_dcn_backend`, checked, with one line in the log that says which kernels will run; a model without
    DCN layers gets neither.

    ``dtype`` is what the model will compute in: its own, or autocast's. Raises ConfigError, naming the flag, when
    ``name`` cannot run there.
    """
    layers = set_dcn_backend(model, name)
    if not layers:
        return
    obstacle = obstacle_to(name, device, dtype) if name != "auto" else None
    if obstacle:
        raise ConfigError(f"--dcn-backend {name}: {obstacle}; use --dcn-backend auto")
    chosen, why = backend_for(device, dtype, name), ""
    if name == "auto" and chosen == "torchvision":
        why = f" ({obstacle_to('triton', device, dtype, False) if device.type == 'cuda' else 'no CUDA device'})"
    LOGGER.info(f"DCN: {plural(layers, 'layer')}, backend {chosen}{why}")
