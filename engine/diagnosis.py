"""What went wrong in a training step, in one line that says what to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from utils.autobatch import largest_batch
from utils.device import to_network_input
from utils.ema import unwrap
from utils.errors import ResourceError, UserError
from utils.nan_search import first_not_finite

MEMORY_SIGNS = ("can't allocate memory", "out of memory")


class TrainingDiverged(UserError):
    """The loss is no longer a finite number."""


def diverged(learner: Any, where: str, parts: Any, images: Tensor, paths: Sequence[str]) -> TrainingDiverged:
    """The error for a loss that is not finite. ``where``: epoch and batch; ``parts``, ``images``: of the batch at which
    it was noticed (on a GPU up to 20 after the first); ``paths``: the newest image files."""
    if images.dtype == torch.uint8:
        images = to_network_input(images, learner.device)
    with torch.autocast(learner.device.type, learner.amp_dtype, enabled=learner.amp_dtype is not None):
        layer = first_not_finite(unwrap(learner.model), images)
    what = "loss" if not torch.isfinite(parts.total) else "gradient"
    rates = ", ".join(f"{group['role']} {group['lr']:.3g}" for group in learner.optimizer.param_groups)
    return TrainingDiverged(
        f"the {what} is not finite at {where} (box {parts.box.item():.3g}, obj {parts.obj.item():.3g}, "
        f"cls {parts.cls.item():.3g}); first: {layer or f'the {what}, all layers are finite'}; "
        f"learning rates {rates}; last images: {', '.join(paths[-3:])}"
    )


def out_of_memory(learner: Any, images: Tensor | None) -> ResourceError:
    """The error for a step that did not fit. On a GPU smaller batches are tried, and the largest that fits is named; on
    a CPU, where the system kills rather than refuses, half of the batch is a hint."""
    if images is None:
        return ResourceError(
            "memory ran out before the first step: use a smaller --batch-size, fewer --workers, no --cache"
        )
    batch, size, ranks = images.shape[0], images.shape[-1], learner.world.size
    where = "GPU" if learner.device.type == "cuda" else learner.device.type.upper()
    fits = _largest_that_fits(learner, batch, size) if learner.device.type == "cuda" else None
    if fits == 0:
        advice = "not even one image fits; use a smaller --imgsz or a smaller model"
    elif fits:
        advice = f"use --batch-size {fits * ranks}, the largest that fits by measurement"
    else:
        advice = f"use --batch-size {max(batch // 2, 1) * ranks}"
    if fits != 0:
        advice += " (gradients are added up to the nominal 64 all the same), or a smaller --imgsz"
    return ResourceError(f"{where} memory ran out at batch {batch * ranks}, {size} px; {advice}")


def _largest_that_fits(learner: Any, batch: int, size: int) -> int | None:
    """Images of ``size`` pixels per rank, below ``batch``, whose step fits; 0 when none does, None when unclear."""
    model, device = unwrap(learner.model), learner.device

    def measure(count: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        images = torch.rand(count, 3, size, size, device=device)
        with torch.autocast(device.type, learner.amp_dtype, enabled=learner.amp_dtype is not None):
            total = sum(level.float().mean() for level in model(images))
        # not backward(): DDP's hooks would send what comes of it to the other ranks
        torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        torch.cuda.synchronize(device)
        return max(torch.cuda.max_memory_reserved(device) - before, 1)

    learner.graphs = None  # their memory goes too
    learner.optimizer.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    sizes = [count for count in (1, 2, 4, 8, 16, 32, 64) if count < batch]
    if not sizes:
        return 0
    try:
        choice = largest_batch(measure, torch.cuda.mem_get_info(device)[0], 0.9, sizes[-1], sizes)
    except ResourceError:
        return 0
    except RuntimeError:  # a device that failed is not always usable again
        return None
    return min(choice.batch, batch - 1)
