"""Which predictions answer for which target: the cells and anchors that YOLOv5's loss trains as positive.

A target of one level is matched to every anchor whose width and height are both within a factor ``anchor_t`` of its
own, in the cell that holds its centre and in up to two neighbours: those across the nearer vertical and the nearer
horizontal side of the cell.

All candidates are kept in fixed-size tensors beside a ``valid`` mask rather than filtered: filtering needs the number
of survivors on the host, and so would stall a GPU's queue three times in every training step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_REACH = 0.5
"""A neighbour is trained too when the centre is within this many cells of the side shared with it."""


@dataclass(frozen=True)
class Matches:
    """Candidates of one level, M = 5 x A x T rows: own cells, then left, upper, right, lower neighbours; in each
    block anchor by anchor, target by target. Rows where ``valid`` is False hold harmless values and must not count.

    image, anchor, row, column, cls: (M,) int64. valid: (M,) bool.
    box: (M, 4) float32 centre relative to the cell's corner, in -0.5..1.5 when valid; width and height in cells.
    anchor_wh: (M, 2) float32, in cells.
    """

    image: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    cls: Tensor
    box: Tensor
    anchor_wh: Tensor
    valid: Tensor


def assign_targets(targets: Tensor, anchors: Tensor, grid_hw: tuple[int, int], anchor_t: float) -> Matches:
    """Match targets to the cells and anchors of one level.

    targets: (T, 6) float32 image index, class, cx, cy, w, h with the box in 0..1 of the network input.
    anchors: (A, 2) float32 width, height in cells of this level. grid_hw: rows and columns of the level.
    anchor_t: largest accepted ratio between a target's side and the anchor's, either way (exclusive).

    The neighbour tests look at the distance to the far edge for right and lower, so a centre exactly on a grid line
    selects its own cell twice (and counts twice in the loss); a centre exactly in the middle selects no neighbour.
    """
    height, width = grid_hw
    shape = (5, anchors.shape[0], targets.shape[0])
    # Python numbers throughout: a small tensor made here would be one more copy to a GPU in every step
    x, y = targets[:, 2] * width, targets[:, 3] * height
    wh = torch.stack((targets[:, 4] * width, targets[:, 5] * height), 1)

    ratio = wh[None] / anchors[:, None]  # (A, T, 2)
    fits = torch.max(ratio, 1 / ratio).amax(2) < anchor_t  # a side of 0 gives inf (or NaN): no match

    own = torch.ones_like(x, dtype=torch.bool)
    left, upper, right, lower = (_reaches(distance) for distance in (x, y, width - x, height - y))
    valid = fits[None] & torch.stack((own, left, upper, right, lower))[:, None]

    # truncated as a cast does, not floored
    column = torch.stack((x, x - _REACH, x, x + _REACH, x)).long().clamp(0, width - 1)  # (5, T)
    row = torch.stack((y, y, y - _REACH, y, y + _REACH)).long().clamp(0, height - 1)
    box = torch.cat((torch.stack((x - column, y - row), 2), wh.expand(5, -1, -1)), 2)  # (5, T, 4)

    def per_anchor(values: Tensor) -> Tensor:
        return values[:, None].expand(*shape, *values.shape[2:]).flatten(0, 2)

    def per_target(values: Tensor) -> Tensor:
        return values.long()[None, None].expand(shape).flatten()

    number = torch.arange(shape[1], device=targets.device)[None, :, None].expand(shape).flatten()
    return Matches(
        image=per_target(targets[:, 0]),
        anchor=number,
        row=per_anchor(row),
        column=per_anchor(column),
        cls=per_target(targets[:, 1]),
        box=per_anchor(box),
        anchor_wh=anchors[number],
        valid=valid.flatten(),
    )


def _reaches(distance: Tensor) -> Tensor:
    """(T,) bool: is the cell beyond this side trained too? ``distance``: cells from the grid's edge on that side."""
    return (distance % 1 < _REACH) & (distance > 1)
