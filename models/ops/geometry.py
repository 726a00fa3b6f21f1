"""What the kernels of a deformable convolution take as compile-time constants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """(y, x) of a setting that may be one number for both."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


@dataclass(frozen=True)
class Geometry:
    """Sizes in elements; pairs are (y, x). ``logits``: masks come as logits, of which the kernels take the sigmoid."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    kernel: tuple[int, int]
    channels: int
    outputs: int
    groups: int
    offset_groups: int
    logits: bool

    @classmethod
    def of(cls, x, weight, stride, padding, dilation, offset_groups, logits) -> Geometry:
        channels, (outputs, group) = x.shape[1], weight.shape[:2]
        kernel = tuple(weight.shape[2:])
        pairs = [tuple(int(n) for n in pair) for pair in (stride, padding, dilation)]
        return cls(*pairs, kernel, channels, outputs, channels // group, offset_groups, logits)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def segment(self) -> int:
        """Channels over which weight group and offset group are both constant."""
        return math.gcd(self.channels // self.groups, self.channels // self.offset_groups)

    def constants(self) -> dict[str, int]:
        """Those that Triton's and CUDA's kernels have in common."""
        (sh, sw), (ph, pw), (dh, dw) = self.stride, self.padding, self.dilation
        return {
            "C": self.channels, "N": self.outputs, "SH": sh, "SW": sw, "PH": ph, "PW": pw, "DH": dh, "DW": dw,
            "LOGITS": int(self.logits),
        }  # fmt: skip
