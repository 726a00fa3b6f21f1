"""Parameter groups by role, for plain and deformable layers, and carrying an optimizer over to another run."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from torch import nn

from utils.errors import CheckpointError, ConfigError
from utils.files import ROOT
from utils.optim import (
    build_optimizer,
    clip_gradients,
    describe,
    parameter_roles,
    restore_optimizer,
    start_momentum_at_zero,
)


class Deformable(nn.Module):
    """A layer with the parameter names of models.common.DCN."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4, 3, 3))
        self.bias = nn.Parameter(torch.zeros(4))
        self.conv_offset_mask = nn.Conv2d(4, 27, 3)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))


def with_dcn() -> nn.Sequential:
    return nn.Sequential(*plain(), Deformable())


def test_roles_and_their_order() -> None:
    model = with_dcn()
    roles = parameter_roles(model)
    assert list(roles) == ["bias", "weight", "norm", "dcn_offset_weight", "dcn_offset_bias"]
    names = {id(p): n for n, p in model.named_parameters()}
    assert {role: [names[id(p)] for p in found] for role, found in roles.items()} == {
        "bias": ["1.bias", "2.bias", "3.bias"],
        "weight": ["0.weight", "2.weight", "3.weight"],
        "norm": ["1.weight"],
        "dcn_offset_weight": ["3.conv_offset_mask.weight"],
        "dcn_offset_bias": ["3.conv_offset_mask.bias"],
    }


def test_plain_models_have_the_three_familiar_groups() -> None:
    assert list(parameter_roles(plain())) == ["bias", "weight", "norm"]
    assert list(parameter_roles(nn.Conv2d(1, 1, 1))) == ["bias", "weight", "norm"]  # the empty one as well


def test_loose_and_odd_parameters_are_weights_and_shared_ones_appear_once() -> None:
    attention = nn.MultiheadAttention(4, 2)
    roles = parameter_roles(nn.ModuleList([attention, attention, nn.LayerNorm(4)]))
    assert any(p is attention.in_proj_bias for p in roles["weight"])
    assert len(roles["weight"]) == 3  # in_proj_weight, in_proj_bias, out_proj.weight
    assert len(roles["norm"]) == 1


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_rates_and_decay_of_the_groups(name: str) -> None:
    optimizer = build_optimizer(with_dcn(), name, 0.01, 0.9, 0.0005, dcn_offset_lr=0.2)
    groups = {g["role"]: g for g in optimizer.param_groups}
    assert [g["weight_decay"] for g in groups.values()] == [0, 0.0005, 0, 0.0005, 0]
    assert [g["lr"] for g in groups.values()] == pytest.approx([0.01, 0.01, 0.01, 0.002, 0.002])
    assert [g["lr_scale"] for g in groups.values()] == [1, 1, 1, 0.2, 0.2]
    if name == "SGD":
        assert all(g["momentum"] == 0.9 and g["nesterov"] for g in groups.values())
    else:
        assert all(g["betas"] == (0.9, 0.999) for g in groups.values())


def test_unknown_optimizer_is_one_line() -> None:
    with pytest.raises(ConfigError, match="--optimizer AdmaW: choose one of SGD, Adam, AdamW, did you mean 'AdamW'"):
        build_optimizer(plain(), "AdmaW", 0.01, 0.9, 0)


def test_description_is_in_the_familiar_form() -> None:
    optimizer = build_optimizer(plain(), "SGD", 0.01, 0.9, 0.0005)
    assert describe(optimizer) == (
        "SGD(lr=0.01) with parameter groups 1 weight(decay=0.0), 2 weight(decay=0.0005), 2 bias"
    )
    assert describe(build_optimizer(with_dcn(), "SGD", 0.01, 0.9, 0.0005)).endswith("2 DCN offset(lr x 0.1)")


def train_a_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_restored_optimizer_goes_on_as_the_first(name: str) -> None:
    x = torch.randn(2, 3, 6, 6)
    first = plain()
    optimizer = build_optimizer(first, name, 0.01, 0.9, 0.0005)
    train_a_step(first, optimizer, x)
    state = deepcopy(optimizer.state_dict())  # a checkpoint shares no memory either
    state["param_groups"][0]["fused"] = True  # as if it had run on a GPU
    second = plain()
    second.load_state_dict(first.state_dict())
    other = build_optimizer(second, name, 0.5, 0.1, 0.0005)
    restore_optimizer(other, state, "last.pt")
    assert [g["fused"] for g in other.param_groups] == [None] * 3
    train_a_step(first, optimizer, x)
    train_a_step(second, other, x)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_frozen_parameter_keeps_its_place_and_value() -> None:
    model = plain()
    frozen = model[0].weight.requires_grad_(False)
    before = frozen.clone()
    optimizer = build_optimizer(model, "SGD", 0.1, 0.9, 0.1)
    train_a_step(model, optimizer, torch.randn(2, 3, 6, 6))
    assert torch.equal(frozen, before)
    thawed = build_optimizer(plain(), "SGD", 0.1, 0.9, 0.1)
    restore_optimizer(thawed, optimizer.state_dict(), "last.pt")


def test_state_of_another_model_is_refused() -> None:
    state = build_optimizer(with_dcn(), "SGD", 0.01, 0.9, 0).state_dict()
    with pytest.raises(CheckpointError, match="last.pt: its optimizer state is of another model"):
        restore_optimizer(build_optimizer(plain(), "SGD", 0.01, 0.9, 0), state, "last.pt")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_run_moves_from_the_cpu_to_a_gpu_and_back(name: str) -> None:
    x, model = torch.randn(2, 3, 6, 6), plain()
    optimizer = build_optimizer(model, name, 0.01, 0.9, 0.0005)
    train_a_step(model, optimizer, x)
    for device in ("cuda", "cpu"):
        state = deepcopy(optimizer.state_dict())
        model = deepcopy(model).to(device)
        optimizer = build_optimizer(model, name, 0.01, 0.9, 0.0005)
        restore_optimizer(optimizer, state, "last.pt")
        assert all(bool(g["fused"]) == (device == "cuda") for g in optimizer.param_groups)
        train_a_step(model, optimizer, x.to(device))
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_skipped_first_step_leaves_no_garbage_in_the_momentum() -> None:
    """As under float16, whose loss scale is too large at first; torch's fused SGD alone goes on from what lay there."""
    seen = []
    torch.use_deterministic_algorithms(True)  # uninitialised memory is then NaN
    try:
        for fused, skipped in ((True, True), (False, False)):
            weight = nn.Parameter(torch.ones(3))
            sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=True, fused=fused)
            optimizer = start_momentum_at_zero(sgd) if fused else sgd
            for found_inf in (1.0,) * skipped + (0.0, 0.0):
                weight.grad = torch.arange(3.0)
                if fused:
                    optimizer.found_inf = torch.tensor(found_inf)
                optimizer.step()
            seen.append(weight.detach().clone())
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*seen)


WITHOUT_COMPILER = """
import sys, torch
from utils.optim import OPTIMIZERS, build_optimizer
for name in OPTIMIZERS:
    model = torch.nn.Linear(2, 1)
    optimizer = build_optimizer(model, name, 0.1, 0.9, 0.0)
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules
"""


def test_no_optimizer_imports_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_steps_are_those_of_torch(name: str) -> None:
    model = plain()
    other = deepcopy(model)
    optimizer = build_optimizer(model, name, 0.1, 0.9, 0.0)
    options = {"momentum": 0.9, "nesterov": True} if name == "SGD" else {"betas": (0.9, 0.999)}
    torchs = getattr(torch.optim, name)(other.parameters(), lr=0.1, weight_decay=0.0, **options)
    for seed in range(3):
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        train_a_step(model, optimizer, x)
        train_a_step(other, torchs, x)
    assert type(optimizer).__name__ == name and isinstance(optimizer, getattr(torch.optim, name))
    assert not any(p.requires_grad for state in optimizer.state.values() for p in state.values() if torch.is_tensor(p))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_restored_momentum_goes_on_and_a_missing_one_is_zero() -> None:
    """A rollback to before the first step and a resumed run, each followed by a step that is skipped."""
    weight = nn.Parameter(torch.ones(3))

    def new() -> torch.optim.SGD:
        sgd = torch.optim.SGD([{"params": [weight], "role": "weight"}], lr=0.1, momentum=0.9, nesterov=True, fused=True)
        return start_momentum_at_zero(sgd)

    def momentum_after_a_step(optimizer: torch.optim.SGD, found_inf: float) -> list[float]:
        weight.grad, optimizer.found_inf = torch.arange(3.0), torch.tensor(found_inf)
        optimizer.step()
        return optimizer.state[weight]["momentum_buffer"].tolist()

    torch.use_deterministic_algorithms(True)  # uninitialised memory is then NaN
    try:
        optimizer, resumed = new(), new()
        beginning = deepcopy(optimizer.state_dict())
        assert momentum_after_a_step(optimizer, 0.0) == [0, 1, 2]
        restore_optimizer(resumed, deepcopy(optimizer.state_dict()), "last.pt")
        assert momentum_after_a_step(resumed, 1.0) == [0, 1, 2]
        restore_optimizer(optimizer, beginning, "last.pt")
        assert momentum_after_a_step(optimizer, 1.0) == [0, 0, 0]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("most", [10.0, 0.0])
def test_offset_branches_are_clipped_apart(most: float) -> None:
    """Their thousandfold norm leaves the gradients of the rest as they are."""
    model = with_dcn()
    optimizer = build_optimizer(model, "SGD", 0.01, 0.9, 5e-4)
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, 1000.0 if "conv_offset_mask" in name else 0.01)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    branches = torch.cat([g.flatten() for name, g in before.items() if "conv_offset_mask" in name]).norm()
    everything = torch.cat([g.flatten() for g in before.values()]).norm()
    assert clip_gradients(optimizer, most).item() == pytest.approx(everything.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        factor = most / branches if most and "conv_offset_mask" in name else 1.0
        torch.testing.assert_close(parameter.grad, before[name] * factor)


def test_frozen_branches_take_no_part() -> None:
    """Their norm would be a zero on the CPU, which does not go together with one on a GPU."""
    model = with_dcn().to("meta")
    optimizer = build_optimizer(model, "SGD", 0.01, 0.9, 5e-4)
    for name, parameter in model.named_parameters():
        if "conv_offset_mask" not in name:
            parameter.grad = torch.ones_like(parameter)
    assert clip_gradients(optimizer, 10.0).device.type == "meta"
    optimizer.zero_grad(set_to_none=True)
    assert clip_gradients(optimizer, 10.0) == 0


def test_without_offset_branches_all_are_clipped_together() -> None:
    model = plain()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 50
    other = deepcopy(model)
    for parameter, copy in zip(model.parameters(), other.parameters()):
        copy.grad = parameter.grad.clone()
    norm = clip_gradients(build_optimizer(model, "SGD", 0.01, 0.9, 5e-4), 10.0)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(other.parameters(), 10.0))
    for parameter, copy in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(parameter.grad, copy.grad)
