"""One arm, trained and measured: YOLOv5's recipe with what the arm changes about it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.collapse.arms import Arm
from benchmarks.collapse.layers import build_model
from benchmarks.collapse.material import Material
from benchmarks.collapse.probe import Probe
from benchmarks.collapse.record import LAYER, STEP
from models.surgery import use_dcn_backend
from utils.config import Hyp
from utils.device import amp_dtype, seed_everything, to_network_input
from utils.loss import DetectionLoss, LossParts
from utils.optim import build_optimizer, scaled_weight_decay, step_if_finite
from utils.schedule import Schedule

EPOCHS = 300
"""Length of the training whose first steps an arm makes: YOLOv5's default, over which the rate falls."""
MANY_LAYERS = 8
"""Layers that are measured in every logged step; of more, fewer steps are measured, so that a record stays small."""
GIVE_UP = 10
"""Logged steps in a row without a gradient or a finite loss after which an arm is over."""


@dataclass(frozen=True)
class Plan:
    """How long and on what every arm is trained. ``every``: iterations between logged steps; ``deadline``: of
    time.monotonic, after which no step is made."""

    cfg: str | dict
    steps: int
    every: int
    seed: int
    device: torch.device
    deadline: float = math.inf


@dataclass
class Outcome:
    """What :func:`run_arm` returns: rows as record.STEP and record.LAYER, layers as Probe.layers, why it ended."""

    rows: list[list[float]] = field(default_factory=list)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    dtype: str = "float32"
    seconds_per_step: float = math.nan
    ended: str = "all steps"


class Trial:
    """Model, loss, optimizer, loss scale and schedule of an arm."""

    def __init__(self, arm: Arm, material: Material, plan: Plan) -> None:
        self.arm, self.device = arm, plan.device
        wanted = amp_dtype(arm.amp, plan.device) if arm.amp == "auto" else DTYPES[arm.amp]
        cuda = plan.device.type == "cuda"
        self.autocast = wanted if cuda else None  # on a CPU only the conversions around DCN are made
        self.dtype = wanted
        seed_everything(plan.seed + 1)  # as train.py
        model = build_model(arm, plan.cfg, material.nc, wanted).to(plan.device)
        self.model = model.to(memory_format=torch.channels_last) if cuda else model
        if arm.blind:  # normalising a constant map amplifies gradients, layer after layer
            model.requires_grad_(False)
            model.detect.requires_grad_(True)
        if arm.layers and arm.backend == "auto":
            use_dcn_backend(self.model, "auto", plan.device, self.autocast or torch.float32)
        hyp, size = Hyp(warmup_bias_lr=arm.warmup_bias_lr), material.images[0].shape[-1]
        batch = len(material.images[0])
        gains = hyp.scaled(model.detect.nl, model.nc, size)
        self.criterion = DetectionLoss(model.detect.anchors, model.stride, model.nc, gains).to(plan.device)
        decay = scaled_weight_decay(hyp.weight_decay, batch)
        self.optimizer = build_optimizer(self.model, "SGD", hyp.lr0, hyp.momentum, decay, arm.offset_lr)
        self._change_groups()
        self.schedule = Schedule(hyp, EPOCHS, material.per_epoch, batch)
        self.schedule.scale = arm.rate
        if arm.warmup is not None:
            self.schedule.warmup = arm.warmup
        self.scaler = torch.amp.GradScaler(plan.device.type, enabled=wanted == torch.float16)
        self.skipped = torch.zeros((), device=plan.device)
        offsets = [g for g in self.optimizer.param_groups if "offset" in g["group"]]
        self.offsets = [p for g in offsets for p in g["params"]]
        inside = {id(p) for p in self.offsets}
        self.others = [p for p in self.model.parameters() if id(p) not in inside]

    def _change_groups(self) -> None:
        for group in self.optimizer.param_groups:
            group["group"] = group["role"]
            if group["role"] == "dcn_offset_weight":
                group["weight_decay"] *= self.arm.offset_decay
            if group["role"] == "dcn_offset_bias" and self.arm.offset_bias_warms:
                group["role"] = "bias"  # of the schedule: its warm-up starts at 0.1

    def backward(self, images: Tensor, targets: Tensor) -> LossParts:
        images = to_network_input(images, self.device)
        if self.arm.blind:
            images = torch.zeros_like(images)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            raw = self.model(images)
        parts = self.criterion(raw, targets)
        self.scaler.scale(parts.total).backward()
        return parts

    def step(self, look: Callable[[], None]) -> Tensor:
        """Unscale, ``look`` at the gradients, clip, step. (4,) on the device: norm of all gradients and of the offset
        branches', factor of the clipping of the rest, norm of the stem's."""
        self.scaler.unscale_(self.optimizer)
        look()
        offsets, others = _gradients(self.offsets), _gradients(self.others)
        inner, outer = _norm(offsets, self.device), _norm(others, self.device)
        total = torch.hypot(inner, outer)
        factor = self._clip(offsets, others, inner, outer, total)
        stem = self.model.model[0].conv.weight.grad
        result = torch.stack((total, inner, factor, stem.norm() if stem is not None else total * math.nan))
        self.skipped += ~torch.isfinite(total)
        step_if_finite(self.optimizer, self.scaler, total)
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _clip(self, offsets: list, others: list, inner: Tensor, outer: Tensor, total: Tensor) -> Tensor:
        """Scale the gradients down in place; the factor of the rest."""
        arm = self.arm
        apart = arm.clip_offsets > 0
        factor = (arm.clip / ((outer if apart else total) + 1e-6)).clamp(max=1) if arm.clip else torch.ones_like(total)
        of_offsets = (arm.clip_offsets / (inner + 1e-6)).clamp(max=1) if apart else factor
        if arm.clip:
            torch._foreach_mul_(others, factor)
        if offsets and (arm.clip or apart):
            torch._foreach_mul_(offsets, of_offsets)
        return factor


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}


def run_arm(arm: Arm, material: Material, plan: Plan, report: Callable[[int, list[float]], None] = print) -> Outcome:
    """Train ``arm`` and measure every ``plan.every``-th iteration that ends in an optimizer step (the first one after
    them). ``report``: called with each logged step."""
    trial = Trial(arm, material, plan)
    probe = Probe(trial.model)
    result = Outcome(dtype=str(trial.dtype or torch.float32).removeprefix("torch."))
    sparse = math.ceil(max(len(probe.modules), 1) / MANY_LAYERS)  # layers are measured in each sparse-th logged step
    due, logged, still = 0, 0, 0
    losses = torch.zeros(4, device=plan.device)  # box, obj, cls and iterations since the last logged step
    start, first = time.perf_counter(), 5
    for iteration in range(plan.steps):
        if iteration == first:
            start = _now(plan.device)
        if time.monotonic() > plan.deadline:
            result.ended = "time"
            break
        settings = trial.schedule.at(*divmod(iteration, material.per_epoch))
        trial.schedule.apply(trial.optimizer, settings)
        logs = iteration >= due and settings.optimizer_step
        looks = logs and logged % sparse == 0
        if looks:
            probe.arm()
        parts = trial.backward(*material.batch(iteration))
        losses += torch.cat((parts.items.float(), losses.new_ones(1)))
        if not settings.optimizer_step:
            continue
        seen: list[Tensor] = []
        norms = trial.step(lambda seen=seen, looks=looks: seen.append(probe.read()) if looks else None)
        if looks:
            probe.disarm()
        if logs:
            due, logged = (iteration // plan.every + 1) * plan.every, logged + 1
            row = _row(trial, iteration, losses, norms, seen[0] if seen else None, len(probe.modules))
            losses.zero_()
            result.rows.append(row)
            report(iteration, row)
            still = still + 1 if _is_over(row) else 0
            if still == GIVE_UP:
                result.ended = "nothing to learn from"
                break
    done = iteration + 1 - first
    result.seconds_per_step = (_now(plan.device) - start) / done if done > 0 else math.nan
    result.layers = probe.layers
    return result


def _row(trial: Trial, iteration: int, losses: Tensor, norms: Tensor, seen: Tensor | None, layers: int) -> list[float]:
    items = losses[:3] / losses[3]
    values = [items.sum()[None], items, norms, trial.skipped[None]]
    if seen is not None and layers:
        values.append(seen)
    numbers = torch.cat([v.to(trial.device) for v in values]).tolist()  # the one transfer
    loss, box, obj, cls, total, offsets, factor, stem, skipped, *rest = numbers
    rates = {group["group"]: group["lr"] for group in trial.optimizer.param_groups}
    share = offsets / total if total > 0 else math.nan
    scale = trial.scaler.get_scale() if trial.scaler.is_enabled() else math.nan
    lrs = [rates.get(role, math.nan) for role in ("weight", "bias", "dcn_offset_weight", "dcn_offset_bias")]
    row = [iteration, loss, box, obj, cls, total, factor, offsets, share, stem, scale, skipped, *lrs]
    assert len(row) == len(STEP)
    return row + (rest or [math.nan] * (layers * len(LAYER)))


def _is_over(row: list[float]) -> bool:
    """No finite loss, or no gradient at all at the stem."""
    return not math.isfinite(row[STEP.index("loss")]) or row[STEP.index("stem_grad")] == 0


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), device=device)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
