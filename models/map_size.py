"""How large a map a layer can make: known from its numbers before memory is taken.

A description comes with a checkpoint, so from a stranger; a few words of it (a scale of 4000, 100,000 input channels)
could ask for more memory than there is, with hardly a weight in the file.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from models.common import DCN
from models.extra import Contract, Expand


def largest_map(module: nn.Module, maps: Sequence[Tensor]) -> int:
    """No less than the number of values in the largest map, of one image, that ``module`` makes of maps (B, C, H, W);
    loose where it enlarges in several steps."""
    channels = sum(each.shape[1] for each in maps)
    side = max(max(each.shape[-2:]) for each in maps)
    largest = channels * side * side
    for part in module.modules():
        side = _side(part, side)
        channels = max(_channels(part, channels), getattr(part, "out_channels", 0), getattr(part, "in_channels", 0))
        largest = max(largest, channels * side * side)
    return largest


def _side(part: nn.Module, side: int) -> int:
    """Rows or columns after one elementary layer, never less than before."""
    if isinstance(part, nn.Upsample):
        return max(side, _largest(part.size or 0), int(side * _largest(part.scale_factor or 0)))
    if isinstance(part, nn.ZeroPad2d):
        return side + 2 * max(0, _largest(part.padding))
    if isinstance(part, nn.ConvTranspose2d):
        reach = _largest(part.dilation) * _largest(part.kernel_size) + _largest(part.output_padding)
        return side * _largest(part.stride) + reach
    if isinstance(part, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
        return side + max(0, 2 * _largest(part.padding) - _smallest(part.kernel_size) + 1)
    return side * part.gain if isinstance(part, Expand) else side


def _channels(part: nn.Module, channels: int) -> int:
    if isinstance(part, DCN):  # its samples are a map of their own
        return max(channels, part.weight[0].numel())
    if isinstance(part, Expand):
        return channels // part.gain**2
    return channels * part.gain**2 if isinstance(part, Contract) else channels


def _largest(size: float | Sequence[float]) -> float:
    return max(size) if isinstance(size, Sequence) else size


def _smallest(size: float | Sequence[float]) -> float:
    return min(size) if isinstance(size, Sequence) else size
