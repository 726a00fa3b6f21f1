"""Whole training steps against upstream's (tests/reference/train_steps.json): model, loss, clip, optimizer, EMA."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engine.epoch import Learner
from models.yolo import DetectionModel
from tests.fill import fill, uniform
from utils.config import Hyp
from utils.dist import World
from utils.ema import ModelEMA
from utils.loss import DetectionLoss
from utils.optim import build_optimizer
from utils.schedule import ROLES, Schedule, StepSettings

REFERENCE = Path(__file__).parents[1] / "reference"
STORED = json.loads((REFERENCE / "train_steps.json").read_text())


@pytest.mark.parametrize(("name", "steps", "rtol", "sum_rtol"), [("SGD", 6, 1e-4, 1e-6), ("AdamW", 2, 1e-3, 1e-3)])
def test_steps_are_upstreams(name: str, steps: int, rtol: float, sum_rtol: float) -> None:
    setup = STORED[name]
    model = fill(DetectionModel("yolov5n.yaml", nc=3)).train()
    momentum = setup["momentum"] if name == "SGD" else 0.937
    optimizer = build_optimizer(model, name, setup["lr0"], momentum, setup["weight_decay_group"])
    rates = {**dict.fromkeys(ROLES, setup["lr0"]), "bias": setup["bias_lr"]}
    Schedule.apply(optimizer, StepSettings(rates, momentum, 1, True))
    criterion = DetectionLoss(model.detect.anchors, model.stride, 3, Hyp().scaled(levels=3, nc=3, imgsz=96))
    ema = ModelEMA(model)
    with np.load(REFERENCE / "loss.npz") as arrays:
        targets = torch.from_numpy(arrays["base/targets"])
    for step, expected in enumerate(setup["steps"][:steps]):
        parts = criterion(model(uniform(f"step/img{step}", (2, 3, 64, 96))), targets)
        parts.total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        assert parts.total.item() == pytest.approx(expected["loss"], rel=rtol)
        assert parts.items.tolist() == pytest.approx(expected["items"], rel=10 * rtol)
        assert norm.item() == pytest.approx(expected["grad_norm"], rel=1e-3)
        state, averaged = model.state_dict(), ema.model.state_dict()
        found = {
            "w0": state["model.0.conv.weight"].abs(),
            "bn0_mean": state["model.0.bn.running_mean"],
            "head_bias": state["model.24.m.0.bias"],
            "ema_w0": averaged["model.0.conv.weight"].abs(),
            "ema_bn9_var": averaged["model.9.cv2.bn.running_var"],
        }
        sums = {key: value.double().sum().item() for key, value in found.items()}
        # the means of the first norm are of both signs: what cancels in their sum leaves float32's rounding, which
        # differs from one processor to the next (2.7e-6 on a Xeon)
        mean = sums.pop("bn0_mean")
        assert mean == pytest.approx(expected["bn0_mean"], rel=sum_rtol, abs=5e-6)
        assert sums == pytest.approx({key: expected[key] for key in sums}, rel=sum_rtol, abs=1e-6)


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_with_a_nan_gradient_leaves_the_weights(kind: type, fused: bool | None) -> None:
    """So that the layer that broke can still be found; the fused kernels decide on the device."""
    model = torch.nn.Linear(3, 2)
    learner = Learner(
        model, None, kind(model.parameters(), lr=0.1, fused=fused), None, torch.amp.GradScaler("cpu", enabled=False),
        None, torch.device("cpu"), World(),
    )  # fmt: skip
    for value, moves in ((1.0, True), (float("nan"), False), (float("inf"), False), (1.0, True)):
        before = model.weight.clone()
        (model(torch.ones(1, 3)).sum() * value).backward()
        assert torch.isfinite(learner.step()) == moves
        assert torch.isfinite(model.weight).all() and (not torch.equal(model.weight, before)) == moves
