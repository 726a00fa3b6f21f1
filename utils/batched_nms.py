"""Greedy non-maximum suppression of all images of a batch at once, in tensor operations: for GPUs, where going image by
image means waiting for the device at every step.

The greedy rule, "a box stays unless a better one that stays overlaps it", is solved by repetition: begin with all
boxes, apply the rule to all of them, until nothing changes. After n rounds everything that depends on chains of at most
n suppressions is final, so the answer is that of going through the boxes one by one, in as many rounds as the longest
chain has links; chains are short.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 512
"""So many candidates an image at a time meet those already kept."""
MOST_PAIRS = 16 << 20
"""Pairs of boxes compared at once: images go in such portions."""
ROUNDS = 4
"""Rounds between two looks at whether anything changed."""


def suppress(boxes: Tensor, images: Tensor, count: int, iou_thres: float, most: int, max_det: int) -> list[Tensor]:
    """Indices of the boxes that stay, one tensor an image, at most ``max_det`` each, in the order given.

    ``boxes`` (k, 4) float32 corners, best first within an image; ``images`` (k,) int64, the image of each, ascending,
    below ``count``. Boxes that overlap by more than ``iou_thres`` suppress each other; no more than the ``most`` best
    of an image take part.
    """
    starts = torch.searchsorted(images, torch.arange(count + 1, device=images.device))
    ends = torch.minimum(starts[1:], starts[:-1] + most)
    longest = int((ends - starts[:-1]).max()) if count else 0
    side = min(longest, BLOCK)
    portion = max(1, MOST_PAIRS // max(side * max(side, min(longest, max_det)), 1))
    kept: list[Tensor] = []
    for first in range(0, count, portion):
        part = slice(first, first + portion)
        kept += _suppress_portion(boxes, starts[:-1][part], ends[part], longest, iou_thres, max_det)
    return kept


def _suppress_portion(
    boxes: Tensor, starts: Tensor, ends: Tensor, longest: int, iou_thres: float, max_det: int
) -> list[Tensor]:
    """Some images, block by block: what stays so far meets the next block, whose boxes then meet each other."""
    kept = starts.new_zeros(len(starts), 0)
    staying = torch.zeros_like(kept, dtype=torch.bool)
    for begin in range(0, longest, BLOCK):
        block = starts[:, None] + torch.arange(begin, min(begin + BLOCK, longest), device=boxes.device)
        valid, block = block < ends[:, None], block.clamp(max=max(len(boxes) - 1, 0))
        its_boxes = boxes[block]
        if begin:
            valid &= ~(_overlaps(boxes[kept], its_boxes, iou_thres) & staying[:, :, None]).any(1)
        pool = torch.cat((kept, block), 1)
        stays = torch.cat((staying, greedy(its_boxes, valid, iou_thres)), 1)
        order = (~stays).to(torch.uint8).argsort(dim=1, stable=True)[:, :max_det]  # those that stay move to the front
        kept, staying = pool.gather(1, order), stays.gather(1, order)
        if begin + BLOCK < longest and kept.shape[1] == max_det and bool(staying.all()):
            break
    return [row[:n] for row, n in zip(kept, staying.sum(1).tolist())]


def greedy(boxes: Tensor, valid: Tensor, iou_thres: float) -> Tensor:
    """(B, K) bool: which of the corner boxes (B, K, 4), best first, stay; those not ``valid`` (B, K) neither stay nor
    suppress."""
    number = torch.arange(boxes.shape[1], device=boxes.device)
    hides = (_overlaps(boxes, boxes, iou_thres) & (number[:, None] < number)).to(
        torch.float16 if boxes.is_cuda else torch.float32
    )  # [i, j]: i is better and overlaps j. As numbers, because a product of matrices counts fastest
    stays = valid
    while True:
        before = stays
        for _ in range(ROUNDS):
            before, hidden = stays, (stays[:, None].to(hides.dtype) @ hides)[:, 0] > 0
            stays = valid & ~hidden
        if torch.equal(stays, before):
            return stays


def _overlaps(a: Tensor, b: Tensor, iou_thres: float) -> Tensor:
    """Corner boxes (B, K, 4) and (B, L, 4) -> (B, K, L) bool, by torchvision's formula: no epsilon, so that boxes
    without an area overlap nothing."""
    (left, top, right, bottom), (left_b, top_b, right_b, bottom_b) = a.unbind(2), b.unbind(2)
    area, area_b = (right - left) * (bottom - top), (right_b - left_b) * (bottom_b - top_b)
    width = torch.minimum(right[:, :, None], right_b[:, None]).sub_(torch.maximum(left[:, :, None], left_b[:, None]))
    height = torch.minimum(bottom[:, :, None], bottom_b[:, None]).sub_(torch.maximum(top[:, :, None], top_b[:, None]))
    inter = width.clamp_(min=0).mul_(height.clamp_(min=0))
    union = (area[:, :, None] + area_b[:, None]).sub_(inter)
    return inter.div_(union) > iou_thres
