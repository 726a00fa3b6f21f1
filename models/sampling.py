"""Where the DCN layers of a model sample in an image: the points of each layer for one place, those of several layers
composed (as in figure 6 of arXiv 1703.06211), and the effective receptive field (arXiv 1701.04128)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.common import DCN
from models.ops.geometry import pair
from utils.errors import ConfigError

MOST_POINTS = 10_000
"""Composed points of one place; deeper chains of layers are cut."""


@dataclass(frozen=True)
class Scale:
    """Where the cells of a map lie in the network's image: centre = step * index + start, (y, x) pixels from its upper
    left corner; the centre of pixel 0 is 0.5."""

    step: tuple[float, float]
    start: tuple[float, float]

    def places(self, index: Tensor) -> Tensor:
        """(..., 2) indices (y, x), whole or not -> (..., 2) pixels."""
        return index * index.new_tensor(self.step) + index.new_tensor(self.start)

    def cells(self, places: Tensor, size: Sequence[int]) -> Tensor:
        """(..., 2) pixels (y, x) -> the nearest cells of a map of ``size`` (H, W), int64."""
        index = ((places - places.new_tensor(self.start)) / places.new_tensor(self.step)).round().long()
        return index.clamp(min=0).minimum(torch.tensor([size[0] - 1, size[1] - 1]))


@dataclass(frozen=True)
class LayerSampling:
    """One DCN layer and the offsets it found in an image. ``raw`` (3*K*G, H', W') float32: (y, x) offsets in input
    pixels for K taps and G groups, then mask logits."""

    name: str
    raw: Tensor
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    source: Scale
    target: Scale

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    def cells(self, places: Tensor) -> Tensor:
        """(..., 2) pixels (y, x) of the network's image -> the nearest outputs."""
        return self.target.cells(places, self.raw.shape[1:])

    def points(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 2) outputs (y, x) -> (N, G*K, 2) pixels (y, x) where they sample, (N, G*K) masks in 0..1."""
        here = self.raw[:, cells[:, 0], cells[:, 1]].T  # (N, 3*K*G)
        pairs = here.shape[1] // 3
        offsets = here[:, : 2 * pairs].unflatten(1, (pairs, 2))
        rest = self._rest(cells).repeat(1, pairs // self.taps, 1)
        return self.source.places(rest + offsets), here[:, 2 * pairs :].sigmoid()

    def rest(self, cells: Tensor) -> Tensor:
        """(N, K, 2) pixels (y, x) where a plain convolution samples."""
        return self.source.places(self._rest(cells))

    def _rest(self, cells: Tensor) -> Tensor:
        taps = torch.cartesian_prod(*(torch.arange(n) for n in self.kernel)).reshape(-1, 2)
        stride, padding, dilation = (torch.tensor(pair) for pair in (self.stride, self.padding, self.dilation))
        return (cells[:, None] * stride - padding + taps * dilation).float()


@dataclass(frozen=True, eq=False)
class Sampling:
    """The DCN layers of a model in an image, in the order in which they ran."""

    layers: list[LayerSampling]
    image: Tensor
    outputs: list[Tensor]

    def cloud(self, place: Tensor) -> tuple[Tensor, Tensor, int]:
        """(M, 2) pixels, (M,) weights and the number of layers taken, the last ones, as many as MOST_POINTS allow.

        What the last layer's output at ``place`` (2,), (y, x) pixels, sees through the layers before it: each of its
        points is a place at which the layer before is asked, and so on. The weight of a point is the product of its
        masks. What lies between the layers is left out.
        """
        points, weights, depth = place[None].float(), torch.ones(1), 0
        for layer in reversed(self.layers):
            each = layer.raw.shape[0] // 3
            if len(points) * each > MOST_POINTS:
                break
            found, masks = layer.points(layer.cells(points))
            points, weights = found.flatten(0, 1), (weights[:, None] * masks).flatten()
            depth += 1
        return points, weights, depth

    def effective_field(self, place: Tensor) -> Tensor:
        """(H, W) float32, 0..1: how much each pixel moves the energy (half the sum of squares) of the last layer's
        output at ``place``, the largest being 1."""
        row, column = self.layers[-1].cells(place)
        energy = self.outputs[-1][0, :, row, column].float().square().sum() / 2
        (gradient,) = torch.autograd.grad(energy, self.image, retain_graph=True)
        field = gradient[0].float().abs().sum(0).cpu()
        return field / field.max().clamp(min=1e-30)


def dcn_layers(model: nn.Module) -> list[tuple[str, DCN]]:
    """(name, module) of each; names as in the model's table, "5.conv". Raises ConfigError when there is none."""
    named = model.named_modules()
    layers = [(name.removeprefix("model."), module) for name, module in named if isinstance(module, DCN)]
    if not layers:
        raise ConfigError("--show-offsets: this model has no DCN layer, so there are no offsets to show")
    return layers


def look(model: nn.Module, image: Tensor) -> Sampling:
    """Run ``model`` over ``image`` (1, 3, H, W) in 0..1 and note where its DCN layers sample.

    Raises ConfigError when there is none.
    """
    layers = dcn_layers(model)
    found: list[tuple[LayerSampling, Tensor]] = []
    height, width = image.shape[2:]
    scales = {(height, width): Scale((1.0, 1.0), (0.5, 0.5))}
    image = image.detach().clone().requires_grad_()

    def scale_of(maps: Tensor) -> Scale:
        h, w = maps.shape[2:]
        step = (height / h, width / w)
        return scales.get((h, w), Scale(step, (step[0] / 2, step[1] / 2)))

    def follow(conv: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if conv.stride != (1, 1):
            scales.setdefault(tuple(output.shape[2:]), _after(scale_of(inputs[0]), conv))

    def note(name: str):
        def hook(layer: DCN, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            steps = (pair(each) for each in (layer.weight.shape[2:], layer.stride, layer.padding, layer.dilation))
            places = LayerSampling(name, raws.pop(), *steps, scale_of(inputs[0]), scale_of(output))
            found.append((places, output))

        return hook

    raws: list[Tensor] = []
    with ExitStack() as hooks, torch.enable_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                hooks.callback(module.register_forward_hook(follow).remove)
        for name, layer in layers:
            branch = layer.conv_offset_mask
            keep = branch.register_forward_hook(lambda _m, _i, raw: raws.append(raw[0].detach().float().cpu()))
            hooks.callback(keep.remove)
            hooks.callback(layer.register_forward_hook(note(name)).remove)
        model(image)
    return Sampling([places for places, _ in found], image, [output for _, output in found])


def _after(scale: Scale, conv: nn.Conv2d) -> Scale:
    """The scale of a convolution's output: its cell i lies in the middle of the cells that it sees."""
    start = []
    for axis in (0, 1):
        middle = (conv.kernel_size[axis] - 1) * conv.dilation[axis] / 2 - conv.padding[axis]
        start.append(scale.start[axis] + scale.step[axis] * middle)
    return Scale(tuple(step * s for step, s in zip(scale.step, conv.stride)), tuple(start))
