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
    portion = max(1, MOST_PAIRS // max(side * (side + min(longest - side, max_det)), 1))
    kept: list[Tensor] = []
    for first in range(0, count, portion):
        part = slice(first, first + portion)
        kept += _suppress_portion(boxes, starts[:-1][part], ends[part], longest, iou_thres, max_det)
    return kept


def _suppress_portion(
    boxes: Tensor, starts: Tensor, ends: Tensor, longest: int, iou_thres: float, max_det: int
) -> list[Tensor]:
    """Some images, block by block: the boxes of a block meet each other and what stays so far."""
    kept = starts.new_zeros(len(starts), 0)
    staying = torch.zeros_like(kept, dtype=torch.bool)
    for begin in range(0, longest, BLOCK):
        block = starts[:, None] + torch.arange(begin, min(begin + BLOCK, longest), device=boxes.device)
        valid, block = block < ends[:, None], block.clamp_(max=max(len(boxes) - 1, 0))
        pool = torch.cat((kept, block), 1)
        stays = torch.cat((staying, greedy(boxes[pool], staying, valid, iou_thres)), 1)
        order = stays.argsort(dim=1, descending=True, stable=True)[:, :max_det]  # those that stay move to the front
        kept, staying = pool.gather(1, order), stays.gather(1, order)
        if begin + BLOCK < longest and kept.shape[1] == max_det and bool(staying.all()):
            break
    return [row[:n] for row, n in zip(kept, staying.sum(1).tolist())]


def greedy(boxes: Tensor, staying: Tensor, valid: Tensor, iou_thres: float) -> Tensor:
    """(B, K) bool: which boxes of a block stay.

    ``boxes`` (B, M + K, 4) corners, best first: M of earlier blocks, which are there for good where ``staying`` (B, M),
    and those of the block, of which those not ``valid`` (B, K) neither stay nor suppress. As few operations as it goes:
    a GPU takes longer to be told of them than to do them.
    """
    earlier = staying.shape[1]
    # as numbers, because a product of matrices counts fastest: 16 bits hold them where GPUs multiply these, which do
    # not count beyond "some"
    number = torch.float16 if boxes.is_cuda else torch.float32
    # [i, j]: i overlaps j and is better
    hides = _overlaps(boxes, earlier, iou_thres).to(number).triu_(1 - earlier)
    free = valid[:, None].to(number)
    if earlier:
        free *= staying[:, None].to(number) @ hides[:, :earlier] == 0
    hides, stays = hides[:, earlier:], free
    while True:
        for _ in range(ROUNDS):
            before, stays = stays, (stays @ hides == 0) * free
        if torch.equal(stays, before):
            return stays[:, 0] > 0


def _overlaps(boxes: Tensor, first: int, iou_thres: float) -> Tensor:
    """Corner boxes (B, K, 4) -> (B, K, K - first) bool, all with those from ``first`` on; by torchvision's formula: no
    epsilon, so that boxes without an area overlap nothing."""
    low, high = boxes[:, :, None, :2], boxes[:, :, None, 2:]
    others = boxes[:, None, first:]
    area = _area(boxes[..., 2:] - boxes[..., :2])
    inter = _area(torch.minimum(high, others[..., 2:]).sub_(torch.maximum(low, others[..., :2])).clamp_(min=0))
    union = (area[:, :, None] + area[:, None, first:]).sub_(inter)
    return inter.div_(union) > iou_thres


def _area(sides: Tensor) -> Tensor:
    """(..., 2) widths and heights -> (...)."""
    return sides[..., 0] * sides[..., 1]
