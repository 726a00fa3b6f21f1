"""The training loss: CIoU of matched boxes, objectness everywhere, classes of matched boxes; named parts.

Everything is computed in float32 whatever the dtype of the predictions, and nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.assign import Matches, assign_targets
from utils.boxes import ciou

if TYPE_CHECKING:
    from utils.config import Hyp

_BALANCE = {3: (4.0, 1.0, 0.4)}
_BALANCE_OTHER = (4.0, 1.0, 0.25, 0.06, 0.02)
_FOCAL_ALPHA = 0.25  # Lin et al., arXiv 1708.02002, section 4


@dataclass(frozen=True)
class LossParts:
    """``total``: scalar, weighted sum times the batch size, for backward. ``box``, ``obj``, ``cls``: detached scalars
    on the device, weighted by their gains, per image."""

    total: Tensor
    box: Tensor
    obj: Tensor
    cls: Tensor

    @property
    def items(self) -> Tensor:
        """(3,) box, obj, cls."""
        return torch.stack((self.box, self.obj, self.cls))


class DetectionLoss(nn.Module):
    """YOLOv5's loss for a list of raw predictions.

    anchors: (nl, A, 2) float, in cells of each level. strides: nl pixels per cell. nc: classes. hyp: gains already
    scaled to the model (``Hyp.scaled``); also read: anchor_t, cls_pw, obj_pw, fl_gamma, label_smoothing.
    autobalance: let the weights of the levels follow their objectness losses. sort_obj_iou: where several targets
    share a cell, its objectness is the best IoU instead of the last one's.
    """

    def __init__(
        self,
        anchors: Tensor,
        strides: Sequence[float] | Tensor,
        nc: int,
        hyp: Hyp,
        autobalance: bool = False,
        sort_obj_iou: bool = False,
    ) -> None:
        super().__init__()
        levels = len(anchors)
        if len(strides) != levels:
            raise ValueError(f"{levels} levels of anchors but {len(strides)} strides")
        if levels > len(_BALANCE_OTHER):
            raise ValueError(f"{levels} output levels: at most {len(_BALANCE_OTHER)} are supported")
        self.nc, self.hyp = nc, hyp
        self.autobalance, self.sort_obj_iou = autobalance, sort_obj_iou
        numbers = [float(stride) for stride in strides]
        self.anchor_level = numbers.index(16.0) if 16.0 in numbers else 0
        balance = _BALANCE.get(levels, _BALANCE_OTHER)[:levels]
        for name, value in (
            ("anchors", anchors.detach().clone().float()),
            ("balance", torch.tensor(balance)),
            ("cls_pw", torch.tensor([hyp.cls_pw])),
            ("obj_pw", torch.tensor([hyp.obj_pw])),
        ):
            self.register_buffer(name, value, persistent=False)

    def forward(self, raw: Sequence[Tensor], targets: Tensor) -> LossParts:
        """raw: nl tensors (B, A, H_i, W_i, 5+nc) of logits, any float dtype. targets: (T, 6) on the same device: image
        index in the batch, class, cx, cy, w, h in 0..1; T may be 0. A level without matches adds nothing to box and
        cls; every cell of every level counts in obj."""
        device = raw[0].device
        if self.anchors.device != device:
            self.to(device)
        with torch.autocast(device.type, enabled=False):
            box, obj, cls = self._levels(raw, targets.float())
            box, obj, cls = box * self.hyp.box, obj * self.hyp.obj, cls * self.hyp.cls
            total = (box + obj + cls) * raw[0].shape[0]
        return LossParts(total, box.detach(), obj.detach(), cls.detach())

    def _levels(self, raw: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        device = targets.device
        box = obj = cls = targets.new_zeros(())
        balance = self.balance
        for level, predicted in enumerate(raw):
            grid_hw = (predicted.shape[2], predicted.shape[3])
            match = assign_targets(targets, self.anchors[level], grid_hw, self.hyp.anchor_t)
            rows = predicted[match.image, match.anchor, match.row, match.column].float()  # (M, 5+nc)
            count = match.valid.sum().clamp(min=1)
            quality = _box_quality(rows, match)
            box = box + torch.where(match.valid, 1 - quality, 0).sum() / count
            goal = self._objectness_goal(predicted.shape[:4], match, quality.detach())
            level_obj = self._bce(predicted[..., 4].float(), goal, self.obj_pw).mean()
            obj = obj + level_obj * balance[level]
            if self.nc > 1:
                cls = cls + self._class_loss(rows, match) / (count * self.nc)
            if self.autobalance:
                step = 0.0001 * (torch.arange(len(balance), device=device) == level)
                balance = balance * (1 - step) + step / level_obj.detach()
        if self.autobalance:
            self.balance = balance / balance[self.anchor_level]
        return box, obj, cls

    def _objectness_goal(self, shape: Sequence[int], match: Matches, quality: Tensor) -> Tensor:
        """(B, A, H, W) float32: the CIoU (at least 0) that each matched cell reached, 0 elsewhere.

        Where several targets share a cell, the last in the order of Matches decides: the same rule on CPU and GPU,
        which plain indexed assignment does not promise on a GPU.
        """
        quality = quality.clamp(min=0)
        images, anchors, height, width = shape
        cells = images * anchors * height * width
        cell = ((match.image * anchors + match.anchor) * height + match.row) * width + match.column
        cell = torch.where(match.valid, cell, cells)  # one cell more takes what must not count
        if self.sort_obj_iou:
            goal = quality.new_zeros(cells + 1).scatter_reduce(0, cell, quality, "amax")
        else:
            order = torch.arange(1, len(cell) + 1, device=cell.device)
            last = order.new_zeros(cells + 1).scatter_reduce(0, cell, order, "amax")
            goal = F.pad(quality, (1, 0))[last]  # entry 0 is the 0 of cells without a match
        return goal[:cells].view(images, anchors, height, width)

    def _class_loss(self, rows: Tensor, match: Matches) -> Tensor:
        """Sum over matches and classes of the binary cross-entropies with (smoothed) one-hot targets."""
        low = 0.5 * self.hyp.label_smoothing
        true = match.cls[:, None] == torch.arange(self.nc, device=rows.device)
        goal = true.float() * (1 - 2 * low) + low  # 1 - eps/2 and eps/2: arXiv 1902.04103, eq. 3
        loss = self._bce(rows[:, 5:], goal, self.cls_pw)
        return torch.where(match.valid[:, None], loss, 0).sum()

    def _bce(self, logits: Tensor, goal: Tensor, pos_weight: Tensor) -> Tensor:
        """Element-wise binary cross-entropy, with the focal factor (arXiv 1708.02002, eq. 5) when fl_gamma > 0."""
        loss = F.binary_cross_entropy_with_logits(logits, goal, pos_weight=pos_weight, reduction="none")
        if self.hyp.fl_gamma == 0:
            return loss
        probability = logits.sigmoid()
        agreement = goal * probability + (1 - goal) * (1 - probability)
        weight = goal * _FOCAL_ALPHA + (1 - goal) * (1 - _FOCAL_ALPHA)
        return loss * weight * (1 - agreement) ** self.hyp.fl_gamma


def _box_quality(rows: Tensor, match: Matches) -> Tensor:
    """(M,) CIoU of the predicted boxes with their targets, in cells; 1 without gradient where not valid.

    Candidates that do not count are replaced before the CIoU, not after it: a NaN that is masked later would still
    reach the gradient (0 x NaN).
    """
    sigmoid = rows[:, :4].sigmoid()
    boxes = torch.cat((sigmoid[:, :2] * 2 - 0.5, (sigmoid[:, 2:] * 2) ** 2 * match.anchor_wh), 1)
    unit = torch.ones_like(boxes)
    valid = match.valid[:, None]
    return ciou(torch.where(valid, boxes, unit), torch.where(valid, match.box, unit))
