"""Greedy non-maximum suppression of all images of a batch at once, in tensor operations: for GPUs, where going image by
image means waiting for the device at every step.

The greedy rule, "a box stays unless a better one that stays overlaps it", is solved by repetition: begin with all
boxes, apply the rule to all of them, until nothing changes. After n rounds everything that depends on chains of at most
n suppressions is final, so the answer is that of going through the boxes one by one, in as many rounds as the longest
chain has links; chains are short. The rounds are guessed and the guess is looked at once, at the end: a device that is
asked after each waits to be told on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

CLASS_OFFSET = 7680.0
"""Boxes of different classes are moved apart by at least this many pixels, so that they do not meet."""
BLOCK = 512
"""So many candidates an image at a time meet those already kept."""
MOST_PAIRS = 16 << 20
"""Pairs of boxes compared at once: images go in such portions."""
ROUNDS = 12
"""Rounds at first, and four times as many as long as the answer is not final. Trained models take 2 to 7."""
LOOK = 4
"""Blocks between two looks at whether all images have enough."""

Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
"""kept, count, final, block, valid -> stays, kept, count, final: :func:`block_step` with its keywords."""


@dataclass(frozen=True)
class RecordedStep:
    """:func:`block_step` for these thresholds as something that takes the same shapes every time, a CUDA graph."""

    iou_thres: float
    max_det: int
    run: Step


def recorded_step(iou_thres: float, max_det: int, record: Callable[[Step], Step]) -> RecordedStep:
    """What ``record``, utils.cuda_graphs.CudaGraphs, makes of :func:`block_step` for these thresholds."""
    return RecordedStep(iou_thres, max_det, record(partial(block_step, iou_thres=iou_thres, max_det=max_det)))


def suppress(
    boxes: Tensor,
    classes: Tensor | None,
    images: Tensor,
    count: int,
    iou_thres: float,
    most: int,
    max_det: int,
    recorded: RecordedStep | None = None,
) -> list[Tensor]:
    """Indices of the boxes that stay, one tensor an image, at most ``max_det`` each, in the order given.

    ``boxes`` (k, 4) float32 corners, best first within an image; ``classes`` (k,), boxes of different ones do not meet
    (None: all do); ``images`` (k,) int64, the image of each, ascending, below ``count``. Boxes that overlap by more
    than ``iou_thres`` suppress each other; no more than the ``most`` best of an image take part. Raises ValueError for
    a ``recorded`` step of other thresholds.
    """
    if recorded and (recorded.iou_thres, recorded.max_det) != (iou_thres, max_det):
        raise ValueError(f"recorded for {recorded.iou_thres}, {recorded.max_det}, not {iou_thres}, {max_det}")
    starts = torch.searchsorted(images, torch.arange(count + 1, device=images.device))
    starts, ends = starts[:-1], torch.minimum(starts[1:], starts[:-1] + most)
    longest = int((ends - starts).max()) if count else 0
    size = BLOCK if recorded else min(longest, BLOCK)
    portion = max(1, MOST_PAIRS // max(size * (size + min(max_det, longest - size)), 1))
    kept: list[Tensor] = []
    for first in range(0, count if longest else 0, portion):
        part = slice(first, first + portion)
        place = starts[part, None] + torch.arange(-(-longest // size) * size, device=boxes.device)
        valid = place < ends[part, None]
        place.clamp_(max=len(boxes) - 1)
        candidates = boxes[place]
        if classes is not None:
            candidates = apart(candidates, classes[place], valid)
        rounds, found = ROUNDS, _blocks(candidates, valid, size, iou_thres, max_det, ROUNDS, recorded)
        while found is None:
            rounds *= 4
            found = _blocks(candidates, valid, size, iou_thres, max_det, rounds)
        staying, counts = found
        kept += place[staying].split(counts)
    return kept or [starts.new_zeros(0)] * count


def apart(boxes: Tensor, classes: Tensor, valid: Tensor) -> Tensor:
    """Boxes (B, K, 4) moved by their class (B, K): at least by CLASS_OFFSET, and by as much as an image is wide, or
    classes would meet. Those not ``valid`` (B, K) do not count."""
    low = boxes.amin(2).masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = boxes.amax(2).masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    return boxes + (classes * (high - low).clamp(min=CLASS_OFFSET))[..., None]


def _blocks(
    candidates: Tensor,
    valid: Tensor,
    size: int,
    iou_thres: float,
    max_det: int,
    rounds: int,
    recorded: RecordedStep | None = None,
) -> tuple[Tensor, list[int]] | None:
    """Which of some images' candidates stay, (B, K) bool, and how many of each; None if a block needs more ``rounds``,
    in a recorded step ROUNDS."""
    step = recorded.run if recorded else partial(block_step, iou_thres=iou_thres, max_det=max_det, rounds=rounds)
    images, length = valid.shape
    kept = candidates.new_zeros(images, (max_det if recorded else min(max_det, length)) + 1, 4)
    count, final = torch.zeros((images, 1), dtype=torch.long, device=valid.device), valid.new_ones(())
    staying = torch.zeros_like(valid)
    for number, begin in enumerate(range(0, length, size), 1):
        here = slice(begin, begin + size)
        seen = {} if recorded else {"seen": min(begin, max_det)}
        stays, kept, count, final = step(kept, count, final, candidates[:, here], valid[:, here], **seen)
        staying[:, here] = stays
        if number % LOOK == 0 and here.stop < length:
            enough = (count >= max_det) | ~valid[:, here.stop, None]
            if bool(enough.all()):
                break
    *counts, is_final = torch.cat((staying.sum(1), final[None])).tolist()
    return (staying, counts) if is_final else None


def block_step(
    kept: Tensor,
    count: Tensor,
    final: Tensor,
    block: Tensor,
    valid: Tensor,
    *,
    iou_thres: float,
    max_det: int,
    rounds: int = ROUNDS,
    seen: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One block of candidates meets those kept so far and one another.

    ``kept`` (B, M + 1, 4) corners of those kept, then zeros, room for all that can be kept and one more, of which the
    first ``seen`` may be taken by now (None: all); ``count`` (B, 1) int64, how many are; ``final`` () bool, whether all
    blocks so far had ``rounds`` enough; ``block`` (B, K, 4), best first, of which those not ``valid`` (B, K) neither
    stay nor suppress. Returns which of the block stay, (B, K) bool, no more than ``max_det`` of an image in all, and
    ``kept``, ``count`` and ``final``, which are changed in place. All of it has the same shapes every time and nothing
    waits for the device, so that it can be recorded.
    """
    stays, settled = greedy(kept[:, :seen], block, valid, iou_thres, rounds)
    place = count + stays.cumsum(1)
    stays = stays & (place <= max_det)
    last = kept.shape[1] - 1  # takes those that do not stay, and is cleared
    kept.scatter_(1, torch.where(stays, place - 1, last)[..., None].expand_as(block), block)
    kept[:, last:] = 0
    torch.clamp(place[:, -1:], max=max_det, out=count)
    return stays, kept, count, final.logical_and_(settled)


def greedy(kept: Tensor, block: Tensor, valid: Tensor, iou_thres: float, rounds: int) -> tuple[Tensor, Tensor]:
    """(B, K) bool, which boxes of a block stay, and () bool, whether that is final after so many rounds.

    ``kept`` (B, M, 4) corners, there for good; ``block`` (B, K, 4), best first; ``valid`` (B, K) as above. As few
    operations as it goes: a GPU takes longer to be told of them than to do them.
    """
    earlier = kept.shape[1]
    overlap = _overlaps(torch.cat((kept, block), 1), earlier, iou_thres)
    # of its own, so that eight lie together
    valid = valid & ~overlap[:, :earlier].any(1) if earlier else valid.clone(memory_format=torch.contiguous_format)
    eight = torch.int64 if block.shape[1] % 8 == 0 else torch.bool  # answers, of a byte each, looked at as one number
    hidden_by = overlap[:, earlier:].tril(-1).view(eight)  # [i, j]: j is better and overlaps i
    stays = before = valid
    for _ in range(rounds):
        before, stays = stays, valid & ~(hidden_by & stays.view(eight)[:, None]).any(2)
    return stays, (stays == before).all()


def _overlaps(boxes: Tensor, first: int, iou_thres: float) -> Tensor:
    """Corner boxes (B, K, 4) -> (B, K, K - first) bool, all with those from ``first`` on; by torchvision's formula: no
    epsilon, so that boxes without an area overlap nothing."""
    low, high = boxes[:, :, None, :2], boxes[:, :, None, 2:]
    others = boxes[:, None, first:]
    area = _area(boxes[..., 2:] - boxes[..., :2])
    inter = _area(torch.minimum(high, others[..., 2:]).sub_(torch.maximum(low, others[..., :2])).clamp_(min=0))
    union = (area[:, :, None] + area[:, None, first:]).sub_(inter)
    return inter.div_(union) > _as_float32(iou_thres)


def _as_float32(threshold: float) -> float:
    """The largest float32 number not above it: what exceeds it exceeds the threshold. torchvision compares with the
    number itself, and a torch comparison would round it."""
    rounded = np.float32(threshold)
    return float(np.nextafter(rounded, np.float32(-1)) if float(rounded) > threshold else rounded)


def _area(sides: Tensor) -> Tensor:
    """(..., 2) widths and heights -> (...)."""
    return sides[..., 0] * sides[..., 1]
