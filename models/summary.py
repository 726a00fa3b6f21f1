"""What a model is made of: a row per layer, parameters, operations and, on request, milliseconds per layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.common import DCN
from models.head import side_multiple

TILE = 256
"""Pixels. Operations are counted on an image of this side, which every stride divides, and grow with its area."""


@dataclass(frozen=True)
class LayerRow:
    """One layer. ``ms`` per pass and ``gflops`` per image."""

    index: int
    source: int | list[int]
    n: int
    params: int
    type: str
    arguments: list
    gflops: float
    ms: float | None = None


@dataclass(frozen=True)
class Summary:
    """``layers`` counts the modules without children, each once; ``gradients`` the parameters that are trained;
    ``gflops`` are 2 x multiply-adds per image of ``imgsz`` x ``imgsz`` pixels."""

    name: str
    rows: list[LayerRow]
    layers: int
    params: int
    gradients: int
    gflops: float
    imgsz: int

    def totals(self) -> str:
        """``YOLOv5n summary: 125 layers, 1,872,157 parameters, 1,872,157 gradients, 4.6 GFLOPs``."""
        return (
            f"{self.name} summary: {self.layers} layers, {self.params:,} parameters, "
            f"{self.gradients:,} gradients, {self.gflops:.1f} GFLOPs"
        )

    def text(self) -> str:
        """The table and the totals."""
        timed = any(row.ms is not None for row in self.rows)
        extra = f"{'GFLOPs':>10}{'ms':>10}" if timed else ""
        lines = [f"\n{'':>3}{'from':>18}{'n':>3}{'params':>10}{extra}  {'module':<40}{'arguments':<30}"]
        for row in self.rows:
            extra = f"{row.gflops:>10.2f}{row.ms or 0:>10.2f}" if timed else ""
            numbers = f"{row.index:>3}{row.source!s:>18}{row.n:>3}{row.params:>10}"
            lines.append(f"{numbers}{extra}  {row.type:<40}{row.arguments!s:<30}")
        if timed:
            lines.append(f"{sum(row.ms or 0 for row in self.rows):.2f} ms for all layers")
        return "\n".join([*lines, "", self.totals()])


def summarize(model: nn.Module, imgsz: int = 640, profile: bool = False, batch_size: int = 1) -> Summary:
    """Describe a DetectionModel. ``profile`` times every layer on the model's device, ``batch_size`` random images.

    The model is left as it was: operations are counted from shapes, and timing runs in eval mode.
    """
    flops = [count * (imgsz / TILE) ** 2 for count in count_flops(model)]
    times = time_layers(model, imgsz, batch_size) if profile else [None] * len(flops)
    rows = [
        LayerRow(
            index=layer.index,
            source=layer.source,
            n=layer.repeats,
            params=sum(p.numel() for p in module.parameters()),
            type=layer.type,
            arguments=layer.args,
            gflops=count / 1e9,
            ms=ms,
        )
        for module, layer, count, ms in zip(model.model, model.layers, flops, times)
    ]
    parameters = list(model.parameters())
    return Summary(
        name=model.yaml_file.removesuffix(".yaml").replace("yolov5", "YOLOv5").replace("model", "Model"),
        rows=rows,
        layers=sum(1 for _ in _leaves(model)),
        params=sum(p.numel() for p in parameters),
        gradients=sum(p.numel() for p in parameters if p.requires_grad),
        gflops=sum(flops) / 1e9,
        imgsz=imgsz,
    )


def _leaves(model: nn.Module) -> Iterator[nn.Module]:
    """Modules without children, shared ones once; the Identity that a folded norm leaves is none."""
    for name, module in model.named_modules():
        folded = isinstance(module, nn.Identity) and name.rpartition(".")[2] == "bn"
        if not folded and not any(True for _ in module.children()):
            yield module


@torch.no_grad()
def count_flops(model: nn.Module) -> list[float]:
    """Operations of each layer for one image of TILE x TILE pixels: 2 x multiply-adds.

    Counted: convolutions and linear maps (no bias), BatchNorm at 4 multiply-adds an element (thop's figure, for
    comparison with published numbers), the four projections of an attention, and of a DCN the matrix product, its
    offset convolution and 4 multiply-adds for each bilinear sample (Cin x taps x pixels of them).
    Not counted, as usual: activations, pools, resizing, additions, attention products, decoding.
    """
    counts = [0.0] * len(model.model)
    handles = []
    for index, layer in enumerate(model.model):
        for module in layer.modules():
            counter = next((count for kind, count in _COUNTERS.items() if isinstance(module, kind)), None)
            if counter is not None:
                handles.append(module.register_forward_hook(_adder(counts, index, counter)))
    parameter = next(model.parameters())
    images = int(parameter.is_meta)  # none costs nothing; the meta device, which refuses that, imports torch's compiler
    try:
        with _evaluating(model):
            model(parameter.new_zeros(images, model.yaml["ch"], TILE, TILE))
    finally:
        for handle in handles:
            handle.remove()
    return counts


def _adder(counts: list[float], index: int, counter: Callable) -> Callable:
    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        counts[index] += 2.0 * counter(module, inputs[0], output)

    return hook


def _values(x: Tensor) -> int:
    """Values for one image, where the batch, whichever dimension it is, has none."""
    return math.prod(side or 1 for side in x.shape)


def _conv_macs(module: nn.Conv2d, x: Tensor, y: Tensor) -> int:
    return _values(y) * module.weight[0].numel()


def _transposed_macs(module: nn.ConvTranspose2d, x: Tensor, y: Tensor) -> int:
    return _values(x) * module.weight[0].numel()


def _linear_macs(module: nn.Linear, x: Tensor, y: Tensor) -> int:
    return _values(y) * module.in_features


def _norm_macs(module: nn.BatchNorm2d, x: Tensor, y: Tensor) -> int:
    return 4 * _values(y)


def _attention_macs(module: nn.MultiheadAttention, x: Tensor, y: tuple) -> int:
    return 4 * module.embed_dim * _values(x)


def _dcn_macs(module: DCN, x: Tensor, y: Tensor) -> int:
    pixels = y.shape[-2] * y.shape[-1]
    taps = module.weight[0, 0].numel()
    return _values(y) * module.weight[0].numel() + 4 * x.shape[1] * taps * pixels


_COUNTERS: dict[type[nn.Module], Callable] = {
    nn.Conv2d: _conv_macs,
    nn.ConvTranspose2d: _transposed_macs,
    nn.Linear: _linear_macs,
    nn.BatchNorm2d: _norm_macs,
    nn.MultiheadAttention: _attention_macs,
    DCN: _dcn_macs,
}


@torch.no_grad()
def time_layers(model: nn.Module, imgsz: int, batch_size: int = 1, repeats: int = 5) -> list[float]:
    """Milliseconds of each layer: the median of ``repeats`` passes after one to warm up, on the model's device.

    ``imgsz`` is rounded up to what the model takes (models.head.side_multiple).
    """
    parameter, multiple = next(model.parameters()), side_multiple(model.stride)
    side = -(-imgsz // multiple) * multiple
    shape = (batch_size, model.yaml["ch"], side, side)
    images = torch.rand(shape, device=parameter.device, dtype=parameter.dtype)
    starts: dict[int, float] = {}
    times: list[list[float]] = [[] for _ in model.model]

    def before(module: nn.Module, inputs: tuple) -> None:
        starts[module.i] = _now(parameter.device)

    def after(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        times[module.i].append((_now(parameter.device) - starts[module.i]) * 1e3)

    handles = [h for m in model.model for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    try:
        with _evaluating(model):
            for _ in range(repeats + 1):
                model(images)
    finally:
        for handle in handles:
            handle.remove()
    return [sorted(values[1:])[repeats // 2] for values in times]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, each module's own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
