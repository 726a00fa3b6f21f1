"""Learning rates, momentum and gradient accumulation as pure functions of (epoch, step): resuming needs only those."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from utils.optim import accumulation

if TYPE_CHECKING:
    from utils.config import Hyp

ROLES = ("bias", "weight", "norm", "dcn_offset_weight", "dcn_offset_bias")


@dataclass(frozen=True)
class StepSettings:
    """What one iteration runs with. ``lr``: by role, before a group's own lr_scale. ``accumulate``: iterations whose
    gradients make one optimizer step. ``optimizer_step``: whether this iteration ends with one."""

    lr: dict[str, float]
    momentum: float
    accumulate: int
    optimizer_step: bool


class Schedule:
    """YOLOv5's schedule for a whole training.

    hyp: reads lr0, lrf, momentum, nominal_batch and the keys of warm-up. batches_per_epoch: iterations of one epoch on
    one rank. batch_size: images per iteration over all ranks. cosine: ``--cos-lr``.
    The warm-up lasts warmup_epochs, and at least warmup_iterations.
    """

    def __init__(self, hyp: Hyp, epochs: int, batches_per_epoch: int, batch_size: int, cosine: bool = False) -> None:
        if epochs < 1 or batches_per_epoch < 1 or batch_size < 1:
            raise ValueError(f"epochs {epochs}, batches {batches_per_epoch}, batch size {batch_size}: all at least 1")
        self.hyp, self.epochs, self.batches, self.batch_size = hyp, epochs, batches_per_epoch, batch_size
        self.cosine = cosine
        self.scale = 1.0  # of every rate; below 1 after a rollback
        self.warmup = max(round(hyp.warmup_epochs * batches_per_epoch), round(hyp.warmup_iterations))

    def factor(self, epoch: float) -> float:
        """Share of lr0 at ``epoch``: from 1 to lrf over the training, on a line or a half cosine."""
        progress = epoch / self.epochs
        if self.cosine:
            return (1 - math.cos(progress * math.pi)) / 2 * (self.hyp.lrf - 1) + 1
        return (1 - progress) * (1 - self.hyp.lrf) + self.hyp.lrf

    def at(self, epoch: int, step_in_epoch: int) -> StepSettings:
        """Settings of iteration ``step_in_epoch`` (from 0) of ``epoch`` (from 0).

        After the epoch in which the warm-up ends, the rate is that of the epoch before: upstream moves its scheduler
        at the end of an epoch to that epoch's own rate (measured; tests/reference/schedules.json).
        """
        iteration = epoch * self.batches + step_in_epoch
        warming = iteration <= self.warmup
        current = epoch if epoch <= self.warmup // self.batches else epoch - 1
        lr = self.hyp.lr0 * self.factor(current)
        momentum, bias_lr = self.hyp.momentum, lr
        if warming:
            span = (0, self.warmup)
            bias_lr = float(np.interp(iteration, span, (self.hyp.warmup_bias_lr, lr)))
            lr = float(np.interp(iteration, span, (0.0, lr)))
            momentum = float(np.interp(iteration, span, (self.hyp.warmup_momentum, momentum)))
        return StepSettings(
            lr={role: (bias_lr if role == "bias" else lr) * self.scale for role in ROLES},
            momentum=momentum,
            accumulate=self._accumulate(iteration),
            optimizer_step=self._is_optimizer_step(iteration),
        )

    def last_optimizer_step(self, iteration: int) -> int:
        """The newest iteration before ``iteration`` that ended with an optimizer step, or -1."""
        for earlier in range(iteration - 1, -1, -1):
            if self._is_optimizer_step(earlier):
                return earlier
        return -1

    @staticmethod
    def apply(optimizer: torch.optim.Optimizer, settings: StepSettings) -> None:
        """Set each group's lr (times its lr_scale) by its "role", and momentum where the optimizer has one (SGD)."""
        for group in optimizer.param_groups:
            group["lr"] = settings.lr[group["role"]] * group.get("lr_scale", 1.0)
            if "momentum" in group:
                group["momentum"] = settings.momentum

    def _accumulate(self, iteration: int) -> int:
        if iteration > self.warmup:
            return accumulation(self.batch_size, self.hyp.nominal_batch)
        wanted = float(np.interp(iteration, (0, self.warmup), (1, self.hyp.nominal_batch / self.batch_size)))
        return max(1, round(wanted))

    @cached_property
    def _warmup_steps(self) -> list[int]:
        """Iterations 0..warmup that end with an optimizer step: a step is due ``accumulate`` after the last one."""
        steps, last = [], -1
        for iteration in range(self.warmup + 1):
            if iteration - last >= self._accumulate(iteration):
                steps.append(iteration)
                last = iteration
        return steps

    def _is_optimizer_step(self, iteration: int) -> bool:
        steps = self._warmup_steps
        if iteration <= self.warmup:
            place = bisect_left(steps, iteration)
            return place < len(steps) and steps[place] == iteration
        return (iteration - steps[-1]) % accumulation(self.batch_size, self.hyp.nominal_batch) == 0
