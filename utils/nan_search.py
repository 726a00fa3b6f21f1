"""Where numbers stop being finite: the first weight or the first layer of a model that holds NaN or infinity."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_not_finite(model: nn.Module, images: Tensor) -> str | None:
    """Where ``model`` first meets a NaN or an infinity for these images, in words; None when all of it is finite.

    Weights come first (an earlier step broke them), in module order; then the images; then the outputs of one forward
    pass, in the order in which modules without children compute them. The pass runs in the model's own mode, so
    BatchNorm statistics move: not for a model that is to be used any further. In training mode those statistics are
    not looked at, since no output comes from them.
    """
    for name, value in model.named_parameters():
        if not _finite(value):
            return f"{name} itself is not finite (an earlier step broke it)"
    if not _finite(images):
        return "the images themselves are not finite"
    found: list[str] = []
    handles = [
        module.register_forward_hook(_reporter(name, found))
        for name, module in model.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _reporter(name: str, found: list[str]):
    def hook(module: nn.Module, inputs: tuple, output: object) -> None:
        if not found and isinstance(output, Tensor) and not _finite(output):
            found.append(f"the output of {name} ({type(module).__name__})")

    return hook


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())
