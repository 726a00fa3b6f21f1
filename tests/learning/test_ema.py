"""The moving average: decay by number of updates, which entries move, wrapped models, early stopping's traces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.early_stopping import EarlyStopping
from utils.ema import ModelEMA, unwrap

STORED = json.loads((Path(__file__).parents[1] / "reference" / "schedules.json").read_text())


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize(("updates", "decay"), STORED["ema_decay"].items())
def test_decay_ramp(updates: str, decay: float) -> None:
    assert ModelEMA(model(), updates=int(updates)).decay == pytest.approx(decay, rel=1e-9)


def test_average_is_the_written_out_one() -> None:
    source = model()
    ema = ModelEMA(source)
    expected = {k: v.double() for k, v in source.state_dict().items()}
    for step in range(1, 4):
        source(torch.randn(2, 3, 5, 5))  # moves the BN statistics
        with torch.no_grad():
            for parameter in source.parameters():
                parameter += torch.randn_like(parameter)
        ema.update(source)
        decay = STORED["ema_decay"]["1"] if step == 1 else ema.decay
        expected = {k: decay * e + (1 - decay) * source.state_dict()[k].double() for k, e in expected.items()}
    for key, value in ema.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6)
    assert ema.updates == 3
    assert ema.model[1].num_batches_tracked == 0  # integers stay
    assert source[1].num_batches_tracked == 3


def test_the_copy_is_apart_from_its_source() -> None:
    source = model().train()
    ema = ModelEMA(source)
    before = {k: v.clone() for k, v in ema.model.state_dict().items()}
    with torch.no_grad():
        source[0].weight += 1
    assert all(torch.equal(before[k], v) for k, v in ema.model.state_dict().items())
    assert not ema.model.training and source.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert all(p.requires_grad for p in source.parameters())


def test_compiled_wrappers_are_looked_through() -> None:
    source = model()
    wrapped = torch.compile(source)  # lazily: nothing is compiled before the first call
    assert unwrap(wrapped) is source
    ema = ModelEMA(wrapped)
    ema.update(wrapped)
    assert list(ema.model.state_dict()) == list(source.state_dict())


def test_continues_from_a_checkpoint() -> None:
    source, other = model(), model()
    first = ModelEMA(source, updates=10)
    second = ModelEMA(other)
    second.load(first.model.state_dict(), 10)
    first.update(source)
    second.update(source)
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "patience"), [("patience3", 3), ("patience2_allzero", 2)])
def test_early_stopping_traces(name: str, patience: int) -> None:
    trace = STORED["early_stopping"][name]
    watch = EarlyStopping(patience)
    for epoch, (fitness, expected) in enumerate(zip(trace["fitness"], trace["stop_possible_best"], strict=True)):
        stop = watch.update(epoch, fitness)
        assert [stop, watch.possible_stop, watch.best_epoch] == expected


def test_early_stopping_remembers_across_a_resume_and_may_be_off() -> None:
    first = EarlyStopping(3)
    first.update(0, 0.5)
    first.update(1, 0.4)
    second = EarlyStopping(3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert not second.update(2, 0.4)
    assert second.update(3, 0.4)
    assert "Best results at epoch 0" in second.message()
    never = EarlyStopping(0)
    assert not any(never.update(epoch, 0.0) for epoch in range(1000))
    assert not never.possible_stop
