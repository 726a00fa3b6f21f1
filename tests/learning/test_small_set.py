"""hyp.small-set.yaml: upstream's constants as hyper-parameters, and where each of them arrives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.epoch import Learner
from engine.parts import Frame, build_learner
from models.yolo import DetectionModel
from utils.config import Hyp, TrainConfig
from utils.dist import World
from utils.errors import ConfigError
from utils.schedule import Schedule

CONSTANTS = {"warmup_iterations": 100, "nominal_batch": 64, "ema_decay": 0.9999, "ema_tau": 2000, "bn_momentum": 0.03}


def learner(hyp: Hyp) -> Learner:
    frame = Frame(imgsz=64, stride=32, batch=16, rank_batch=16)
    return build_learner(
        DetectionModel("yolov5n.yaml", nc=1), TrainConfig(), hyp, frame, 13, torch.device("cpu"), World()
    )


def test_without_them_all_is_as_upstream_has_it() -> None:
    low, missing = Hyp.load("hyp.scratch-low.yaml")
    assert not missing and {key: getattr(low, key) for key in CONSTANTS} == CONSTANTS
    small, _ = Hyp.load("hyp.small-set.yaml")
    others = set(low.to_dict()) - {*CONSTANTS, "warmup_epochs"}
    assert all(getattr(small, key) == getattr(low, key) for key in others)


def test_each_arrives() -> None:
    small = learner(Hyp.load("hyp.small-set.yaml")[0])
    assert {m.momentum for m in small.model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    small.ema.updates = 100
    assert small.ema.decay == pytest.approx(0.98 * (1 - 1 / 2.718281828), rel=1e-6)
    (decayed,) = [group for group in small.optimizer.param_groups if group["role"] == "weight"]
    assert decayed["weight_decay"] == 0.0005 / 4  # four times as many steps as the nominal batch's
    usual = learner(Hyp())
    assert {m.momentum for m in usual.model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.03}


def test_a_step_after_every_batch_and_a_warm_up_of_two_epochs() -> None:
    schedule = Schedule(Hyp.load("hyp.small-set.yaml")[0], epochs=30, batches_per_epoch=13, batch_size=16)
    assert schedule.warmup == 26
    steps = [schedule.at(*divmod(iteration, 13)) for iteration in range(60)]
    assert all(step.optimizer_step and step.accumulate == 1 for step in steps)
    assert steps[26].lr["weight"] == pytest.approx(0.01 * schedule.factor(2))
    assert Schedule(Hyp(), epochs=30, batches_per_epoch=13, batch_size=16).warmup == 100


@pytest.mark.parametrize(
    ("key", "value"), [("warmup_iterations", 0), ("nominal_batch", 0), ("ema_decay", 1.5), ("bn_momentum", 0)]
)
def test_values_that_cannot_be(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{key}: {value} is outside"):
        Hyp.from_dict({key: value})
