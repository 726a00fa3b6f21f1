"""Watch the offsets of deformable layers during training, and warn before a layer is lost.

Offsets are unbounded, and a sample outside the image has value and gradients of exactly zero: nothing pulls it back.
When all samples of a layer have left, its output is constant and everything before it stops learning. See
docs/dcn.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SAMPLE = 4096
"""Offsets of a layer, at most, whose lengths are kept for a histogram."""
ESCAPED = 0.3
"""Share of samples outside the image, beyond the share that padding alone puts there, that calls for a warning."""


@dataclass(frozen=True)
class Geometry:
    """Where a layer samples before any offset: input size, kernel, and the convolution's steps, as (y, x) pairs."""

    size: tuple[int, int]
    out: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def positions(self, axis: int, like: Tensor) -> Tensor:
        """(out, kernel) float32 coordinates along ``axis`` (0 y, 1 x) of each output's taps, in input pixels."""
        start = torch.arange(self.out[axis], device=like.device) * self.stride[axis] - self.padding[axis]
        taps = torch.arange(self.kernel[axis], device=like.device) * self.dilation[axis]
        return (start[:, None] + taps).float()

    def outside_at_rest(self) -> float:
        """Share of samples outside the image while all offsets are zero: those in the padding."""
        inside = 1.0
        for axis in (0, 1):
            places = self.positions(axis, torch.empty(0))
            inside *= _inside(places, self.size[axis]).float().mean().item()
        return 1 - inside


class DcnWatch:
    """Statistics of every layer of ``model`` that has a ``conv_offset_mask`` branch (models.common.DCN).

    The branch is a convolution whose output (B, 3*K*G, H', W') holds (y, x) offsets in input pixels for K taps and G
    groups, then K*G mask logits. The model is on its device by now. Of the training steps of an epoch that :meth:`step`
    surrounds the first and every ``every``-th after it is measured, on the device and without reading anything back; in
    the others nothing is hooked.
    """

    def __init__(self, model: nn.Module, every: int = 50) -> None:
        self.layers = {
            name: module.conv_offset_mask
            for name, module in model.named_modules()
            if isinstance(getattr(module, "conv_offset_mask", None), nn.Module)
        }
        self.every = every
        self._steps = 0
        # Made here and written to inside a measured step: what is allocated inside may lie in the memory of CUDA graphs
        # (engine/graphs.py), which the next replay writes over.
        devices = {name: next(branch.parameters()).device for name, branch in self.layers.items()}
        # (5,) sums over samplings: mean |offset|, max, outside, mask, count
        self._sums = {name: torch.zeros(5, device=device) for name, device in devices.items()}
        # (SAMPLE,) lengths of the newest sampling, as many as _sampled says
        self._lengths = {name: torch.empty(SAMPLE, device=device) for name, device in devices.items()}
        self._sampled: dict[str, int] = {}
        self._geometry: dict[str, Geometry] = {}
        self._warned: set[str] = set()

    def start_epoch(self) -> None:
        """Measure the next step: every epoch has one, however short it is."""
        self._steps = 0

    @contextmanager
    def step(self) -> Iterator[bool]:
        """Around one training step: yields whether it is one of those whose forward passes are measured."""
        measured = bool(self.layers) and self._steps % self.every == 0
        self._steps += 1
        hooked = self.layers.items() if measured else ()
        handles = [branch.register_forward_hook(self._hook(name)) for name, branch in hooked]
        try:
            yield measured
        finally:
            for handle in handles:
                handle.remove()

    def summary(self) -> dict[str, dict[str, float]]:
        """Means since the last call, per layer, read from the device in one go; layers not sampled are left out.

        mean_offset, max_offset: length of the offsets, pixels of the layer's input. outside, outside_at_rest: shares
        of samples outside the image now and with zero offsets. mean_mask: 0..1. height, width: of the layer's input.
        """
        if not self._sums:
            return {}
        rows = torch.stack(list(self._sums.values())).tolist()
        result = {}
        for name, (mean, largest, outside, mask, count) in zip(self._sums, rows, strict=True):
            if not count:
                continue
            geometry = self._geometry[name]
            result[name] = {
                "mean_offset": mean / count,
                "max_offset": largest,
                "outside": outside / count,
                "outside_at_rest": geometry.outside_at_rest(),
                "mean_mask": mask / count,
                "height": float(geometry.size[0]),
                "width": float(geometry.size[1]),
            }
        for sums in self._sums.values():
            sums.zero_()
        return result

    def lengths(self) -> dict[str, Tensor]:
        """Per layer up to SAMPLE lengths of offsets (float32, pixels of the layer's input, on the CPU), evenly spread
        over the newest measured pass."""
        return {name: self._lengths[name][:count].cpu() for name, count in self._sampled.items()}

    def warnings(self, summary: dict[str, dict[str, float]], offset_lr: float = 0.1) -> list[str]:
        """One line for each layer of :meth:`summary` that is escaping; no layer is reported twice. ``offset_lr``: the
        run's --dcn-offset-lr, for the line."""
        lines = []
        for name, values in summary.items():
            if name in self._warned or not _is_escaping(values):
                continue
            self._warned.add(name)
            lines.append(
                f"DCN layer {name}: {values['outside']:.0%} of its samples lie outside the image (mean |offset| "
                f"{values['mean_offset']:.3g} px on a {values['width']:.0f}x{values['height']:.0f} map): it is "
                f"escaping; lower --dcn-offset-lr (now {offset_lr:g}) or use --clip-grad"
            )
        return lines

    def _hook(self, name: str):
        @torch.no_grad()
        def record(branch: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            geometry = geometry_of(branch, inputs[0], output)
            row, lengths = _measure(output.detach(), geometry)
            sums, self._sampled[name] = self._sums[name], len(lengths)
            largest = torch.maximum(sums[1], row[1])
            sums += row
            sums[1] = largest
            self._lengths[name][: len(lengths)] = lengths
            self._geometry[name] = geometry  # of the newest pass: --multi-scale changes it

        return record


def displaced(output: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Of ``output`` (B, 3*K*G, H', W'): the offsets (B, G, kh, kw, 2, H', W') float32, (y, x) pixels of the layer's
    input, and whether each sample sees the image, bool without the axis of 2."""
    batch, channels, height, width = output.shape
    pairs, taps = channels // 3, math.prod(geometry.kernel)
    offset = output[:, : 2 * pairs].float().view(batch, pairs // taps, *geometry.kernel, 2, height, width)
    dy, dx = offset.unbind(4)  # (B, G, kh, kw, H', W')
    y = geometry.positions(0, output).T[:, None, :, None] + dy  # kh along taps, H' along rows
    x = geometry.positions(1, output).T[None, :, None, :] + dx
    return offset, _inside(y, geometry.size[0]) & _inside(x, geometry.size[1])


def _measure(output: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """(5,) float32: mean and largest offset length, share outside, mean mask, 1; and up to SAMPLE of the lengths."""
    offset, inside = displaced(output, geometry)
    length = torch.hypot(*offset.unbind(4))
    mask = output[:, output.shape[1] // 3 * 2 :].float().sigmoid()
    one = torch.ones((), device=output.device)
    some = length.flatten()[:: math.ceil(length.numel() / SAMPLE)]
    return torch.stack((length.mean(), length.amax(), 1 - inside.float().mean(), mask.mean(), one)), some


def _inside(places: Tensor, size: int) -> Tensor:
    """Whether samples there can see the image at all: bilinear weights end one pixel outside. NaN is outside."""
    return (places > -1) & (places < size)


def geometry_of(branch: nn.Conv2d, image: Tensor, output: Tensor) -> Geometry:
    """The geometry of a layer whose ``branch`` made ``output`` of ``image``, its input (B, C, H, W)."""
    pairs = (_pair(value) for value in (branch.kernel_size, branch.stride, branch.padding, branch.dilation))
    return Geometry(tuple(image.shape[2:]), tuple(output.shape[2:]), *pairs)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _is_escaping(values: dict[str, float]) -> bool:
    if not math.isfinite(values["mean_offset"]):
        return True
    far = values["mean_offset"] > values["height"] / 4
    return far or values["outside"] - values["outside_at_rest"] > ESCAPED
