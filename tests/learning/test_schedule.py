"""The schedule against upstream's measured rates (tests/reference/schedules.json)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from utils.config import Hyp
from utils.optim import accumulation, scaled_weight_decay
from utils.schedule import ROLES, Schedule, StepSettings

STORED = json.loads((Path(__file__).parents[1] / "reference" / "schedules.json").read_text())
RUNS = [name for name in STORED if name.startswith("sim_")]


def schedule_of(run: dict) -> Schedule:
    return Schedule(Hyp(), run["epochs"], run["nb"], run["batch"], run["cos"])


@pytest.mark.parametrize(
    ("name", "epochs", "lrf", "cosine"),
    [
        ("linear_100", 100, 0.01, False),
        ("cosine_100", 100, 0.01, True),
        ("linear_300_lrf0.1", 300, 0.1, False),
        ("cosine_300_lrf0.1", 300, 0.1, True),
    ],
)
def test_rate_per_epoch(name: str, epochs: int, lrf: float, cosine: bool) -> None:
    schedule = Schedule(Hyp(lrf=lrf), epochs, 10, 64, cosine)
    expected = STORED[name]
    found = [0.01 * schedule.factor(epoch) for epoch in range(len(expected))]
    assert found == pytest.approx(expected, abs=1e-12, rel=1e-9)


@pytest.mark.parametrize("name", RUNS)
def test_every_iteration_of_a_training(name: str) -> None:
    run = STORED[name]
    schedule = schedule_of(run)
    for iteration, bias, weight, norm, momentum, accumulate, stepped in run["rows"]:
        found = schedule.at(*divmod(iteration, run["nb"]))
        rates = [found.lr["bias"], found.lr["weight"], found.lr["norm"], found.momentum]
        assert rates == pytest.approx([bias, weight, norm, momentum], rel=1e-9, abs=1e-12), iteration
        assert (found.accumulate, found.optimizer_step) == (accumulate, bool(stepped)), iteration
    ends = [list(schedule.at(epoch, run["nb"] - 1).lr.values())[:3] for epoch in range(run["epochs"])]
    for found, expected in zip(ends, run["epoch_end_lr"], strict=True):
        assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", RUNS)
def test_optimizer_steps_without_any_memory(name: str) -> None:
    """The flag of a single iteration agrees with counting from the start, so a resumed run needs no counter."""
    run = STORED[name]
    schedule = schedule_of(run)
    last, steps = -1, 0
    for iteration in range(run["nb"] * run["epochs"]):
        settings = schedule.at(*divmod(iteration, run["nb"]))
        assert schedule.last_optimizer_step(iteration) == last
        assert settings.optimizer_step == (iteration - last >= settings.accumulate)
        if settings.optimizer_step:
            last, steps = iteration, steps + 1
    assert steps == run["optimizer_steps"]


def test_apply_scales_by_group_and_leaves_adam_its_betas() -> None:
    parameter = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [
        {"params": parameter[:1], "role": "bias", "lr_scale": 1.0},
        {"params": parameter[1:], "role": "dcn_offset_weight", "lr_scale": 0.1},
    ]
    settings = StepSettings({**dict.fromkeys(ROLES, 0.5), "bias": 0.2}, 0.7, 1, True)
    sgd = torch.optim.SGD([dict(g) for g in groups], lr=1.0, momentum=0.9)
    Schedule.apply(sgd, settings)
    assert [g["lr"] for g in sgd.param_groups] == pytest.approx([0.2, 0.05])
    assert [g["momentum"] for g in sgd.param_groups] == [0.7, 0.7]
    adam = torch.optim.AdamW([dict(g) for g in groups], lr=1.0, betas=(0.9, 0.999))
    Schedule.apply(adam, settings)
    assert [g["betas"] for g in adam.param_groups] == [(0.9, 0.999)] * 2
    assert "momentum" not in adam.param_groups[0]


def test_offset_biases_are_not_warmed_up_from_above() -> None:
    settings = Schedule(Hyp(), 10, 100, 16).at(0, 0)
    assert settings.lr["bias"] == 0.1
    assert settings.lr["dcn_offset_bias"] == settings.lr["dcn_offset_weight"] == 0.0


@pytest.mark.parametrize(
    ("batch", "steps", "decay"), [(16, 4, 0.0005), (64, 1, 0.0005), (128, 1, 0.001), (24, 3, 0.0005625)]
)
def test_nominal_batch(batch: int, steps: int, decay: float) -> None:
    assert accumulation(batch) == steps
    assert scaled_weight_decay(0.0005, batch) == pytest.approx(decay)


def test_empty_trainings_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Schedule(Hyp(), 10, 0, 16)
