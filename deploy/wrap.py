"""A trained model made ready for a converter: fused, its DCN layers in an export form, one tensor out."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deploy.dcn_forms import ExportDCN, use_dcn_form
from models.activations import MemoryEfficientMish, Mish
from models.common import DCN
from models.head import Detect
from models.yolo import DetectionModel


class ExportModel(nn.Module):
    """images (B, 3, H, W) in 0..1, float32 or float16 -> decoded predictions (B, N, 5 + nc) float32, see
    :meth:`models.head.Detect.decode`."""

    def __init__(
        self,
        model: DetectionModel,
        form: str,
        half: bool = False,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        """A copy of ``model`` (fused, eval mode). ``form`` of DCN layers, empty where it has none; ``half``: weights in
        float16; ``layout`` of the weights."""
        super().__init__()
        self.model = copy.deepcopy(model).to(memory_format=layout)
        _replace(self.model, MemoryEfficientMish, Mish())  # a backward pass of its own, which converters cannot hold
        if form:
            use_dcn_form(self.model, form)
        if half:
            _half(self.model)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[0]


def _replace(model: nn.Module, kind: type[nn.Module], by: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, by)


def _half(model: DetectionModel) -> None:
    """float16, but for what DCN layers sample with and Detect's anchors and strides: boxes are computed in float32, and
    anchors of AutoAnchor would lose three digits."""
    kept = [each for each in model.modules() if isinstance(each, ExportDCN)]
    kept = [(each, copy.deepcopy(each.sampling)) for each in kept]
    anchors, stride = model.detect.anchors.clone(), model.detect.stride.clone()
    model.half()
    for layer, sampling in kept:
        layer.sampling = sampling
    model.detect.anchors, model.detect.stride = anchors, stride


class RawModel(nn.Module):
    """images -> the logits of each level as Detect's convolutions give them, (B, A * (5 + nc), H_i, W_i): for runtimes
    without the shuffling of five axes that decoding takes. :func:`decode_raw` does the rest."""

    def __init__(self, model: ExportModel) -> None:
        super().__init__()
        self.model = model.model
        self.model.model[-1] = _RawHead(self.model.detect)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.model(images)


class _RawHead(nn.Module):
    def __init__(self, detect: Detect) -> None:
        super().__init__()
        self.m = detect.m

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(conv(x) for conv, x in zip(self.m, features))


def decode_raw(levels: Sequence[Tensor], anchors: Tensor, strides: Sequence[float]) -> Tensor:
    """What RawModel gives -> decoded (B, N, 5 + nc) float32. ``anchors`` (nl, A, 2) in pixels."""
    outputs = levels[0].shape[1] // anchors.shape[1]
    detect = Detect(outputs - 5, anchors.flatten(1).tolist(), [1] * len(levels))
    detect.set_anchors(anchors, strides)
    rows = [y.view(len(y), detect.na, outputs, *y.shape[2:]).permute(0, 1, 3, 4, 2) for y in levels]
    return detect.decode([each.contiguous() for each in rows])


def has_dcn(model: nn.Module) -> bool:
    """Whether any layer is deformable."""
    return any(isinstance(module, DCN) for module in model.modules())


def dynamic_axes(multiple: int) -> dict:
    """For torch.export: free batch, height and width, both multiples of ``multiple`` pixels."""
    size = torch.export.Dim
    return {0: size("batch"), 2: multiple * size("rows"), 3: multiple * size("columns")}


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Silence for converters that tell of their inner life: warnings, and loggers of these names below errors."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in loggers:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
