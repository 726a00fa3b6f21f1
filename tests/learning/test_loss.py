"""The loss against values measured from upstream (tests/reference/loss.*), and what must hold for any input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fill import uniform
from utils.assign import assign_targets
from utils.config import Hyp
from utils.loss import DetectionLoss

REFERENCE = Path(__file__).parents[1] / "reference"
STORED = json.loads((REFERENCE / "loss.json").read_text())
CASES = STORED["cases"]
ANCHORS = torch.tensor(CASES["base"]["anchors_px"], dtype=torch.float32).view(3, 3, 2)
STRIDES = [8, 16, 32]


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(REFERENCE / "loss.npz") as file:
        return dict(file)


def anchors_of(case: dict) -> torch.Tensor:
    strides = torch.tensor(case["strides"], dtype=torch.float32)
    pixels = torch.tensor(case["anchors_px"], dtype=torch.float32).view(len(strides), -1, 2)
    return pixels / strides.view(-1, 1, 1)


def loss_of(case: dict) -> DetectionLoss:
    hyp = Hyp.from_dict({**STORED["hyp_base"], **case["hyp_over"]})
    flags = {key: case[key] for key in ("autobalance", "sort_obj_iou")}
    return DetectionLoss(anchors_of(case), case["strides"], case["nc"], hyp, **flags)


def predictions_of(case: dict) -> list[torch.Tensor]:
    raw = []
    for level, stride in enumerate(case["strides"]):
        shape = (case["bs"], 3, case["h"] // stride, case["w"] // stride, case["nc"] + 5)
        raw.append(uniform(f"loss/{case['pred_key']}/p{level}", shape, -2, 2).requires_grad_())
    return raw


def simple(nc: int = 3, **over: float) -> DetectionLoss:
    strides = torch.tensor(STRIDES, dtype=torch.float32).view(3, 1, 1)
    return DetectionLoss(ANCHORS / strides, STRIDES, nc, Hyp(**over))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_upstreams(name: str, arrays: dict[str, np.ndarray]) -> None:
    case = CASES[name]
    criterion = loss_of(case)
    targets = torch.from_numpy(arrays[f"{name}/targets"])
    for expected in case["results_total_box_obj_cls"]:
        raw = predictions_of(case)
        parts = criterion(raw, targets)
        found = torch.stack((parts.total, parts.box, parts.obj, parts.cls)).tolist()
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)
    parts.total.backward()
    for level, prediction in enumerate(raw):
        assert prediction.grad.abs().sum().item() == pytest.approx(case["grad_abs_sum"][level], rel=1e-5)
        if f"{name}/grad{level}" in arrays:
            np.testing.assert_allclose(prediction.grad, arrays[f"{name}/grad{level}"], rtol=1e-4, atol=1e-7)
    balance = case["balance_after"][: len(raw)]
    assert criterion.balance.tolist() == pytest.approx(balance, rel=1e-6)


@pytest.mark.parametrize("name", [n for n in CASES if n in ("base", "empty", "borders", "four_levels", "anchor_t_2")])
def test_built_targets_are_upstreams_in_order(name: str, arrays: dict[str, np.ndarray]) -> None:
    case = CASES[name]
    targets = torch.from_numpy(arrays[f"{name}/targets"])
    anchor_t = case["hyp_over"].get("anchor_t", 4.0)
    for level, stride in enumerate(case["strides"]):
        grid = (case["h"] // stride, case["w"] // stride)
        match = assign_targets(targets, anchors_of(case)[level], grid, anchor_t)
        index = torch.stack((match.image, match.anchor, match.row, match.column, match.cls), 1)
        np.testing.assert_array_equal(index[match.valid], arrays[f"{name}/bt{level}_index"])
        np.testing.assert_allclose(match.box[match.valid], arrays[f"{name}/bt{level}_box"], atol=1e-6)
        np.testing.assert_allclose(match.anchor_wh[match.valid], arrays[f"{name}/bt{level}_anchor"], rtol=1e-6)


def one_target(*box: float, cls: int = 0) -> torch.Tensor:
    return torch.tensor([[0, cls, *box]], dtype=torch.float32)


def level_outputs(batch: int = 2, nc: int = 3, fill: float | None = None) -> list[torch.Tensor]:
    shapes = [(batch, 3, 64 // s, 96 // s, nc + 5) for s in STRIDES]
    if fill is not None:
        return [torch.full(shape, fill) for shape in shapes]
    return [uniform(f"outputs{i}", shape, -2, 2) for i, shape in enumerate(shapes)]


def test_without_targets_only_objectness_counts() -> None:
    raw = [r.requires_grad_() for r in level_outputs()]
    parts = simple()(raw, torch.zeros(0, 6))
    parts.total.backward()
    assert (parts.box, parts.cls) == (0, 0)
    assert parts.obj > 0
    assert all(torch.isfinite(r.grad).all() for r in raw)
    assert all(r.grad[..., :4].abs().sum() == 0 for r in raw)


def test_a_target_no_anchor_fits_is_background() -> None:
    raw = level_outputs()
    empty = simple()(raw, torch.zeros(0, 6))
    for box in [(0.5, 0.5, 0.001, 0.9), (0.5, 0.5, 0.0, 0.0)]:  # a sliver; a box of no size
        parts = simple()(raw, one_target(*box))
        assert parts.total.item() == empty.total.item()


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_extreme_predictions_beside_the_target_leave_gradients_finite(logit: float) -> None:
    """Candidates that do not count must not reach the gradient, even where their own CIoU would be NaN."""
    targets = one_target(0.52, 0.52, 0.1, 0.1)
    matches = [assign_targets(targets, a / s, (64 // s, 96 // s), 4.0) for a, s in zip(ANCHORS, STRIDES, strict=True)]
    raw = level_outputs(fill=logit)
    for prediction, match in zip(raw, matches, strict=True):
        rows = (match.image, match.anchor, match.row, match.column)
        prediction[tuple(index[match.valid] for index in rows)] = 0.0
        prediction.requires_grad_()
    parts = simple()(raw, targets)
    parts.total.backward()
    assert torch.isfinite(parts.total)
    assert all(torch.isfinite(r.grad).all() for r in raw)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_predictions_are_computed_in_float32(dtype: torch.dtype) -> None:
    raw = [r.to(dtype) for r in level_outputs()]
    targets = one_target(0.4, 0.6, 0.2, 0.3, cls=1)
    with torch.autocast("cpu", torch.bfloat16):
        half = simple()(raw, targets)
    full = simple()([r.float() for r in raw], targets)
    assert half.total.dtype == torch.float32
    assert half.items.tolist() == full.items.tolist()


def test_a_cell_of_several_targets_takes_the_last_or_the_best() -> None:
    criterion = simple(nc=1)
    raw = level_outputs(batch=1, nc=1)
    targets = torch.cat([one_target(0.52, 0.52, w, w) for w in (0.2, 0.1, 0.3)])
    match = assign_targets(targets, criterion.anchors[0], (8, 12), 4.0)
    quality = torch.linspace(0.9, 0.1, len(match.valid))
    cell = [tuple(i) for i in torch.stack((match.image, match.anchor, match.row, match.column), 1).tolist()]
    last, best = torch.zeros(1, 3, 8, 12), torch.zeros(1, 3, 8, 12)
    for index, valid, value in zip(cell, match.valid, quality, strict=True):
        if valid:
            last[index] = value
            best[index] = max(best[index], value)
    assert (last != best).any()
    assert torch.equal(criterion._objectness_goal(raw[0].shape[:4], match, quality), last)
    criterion.sort_obj_iou = True
    assert torch.equal(criterion._objectness_goal(raw[0].shape[:4], match, quality), best)


def test_nothing_is_read_back_to_the_host() -> None:
    """Fake tensors have shapes but no values: any .item() or value-dependent shape raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        raw = [torch.empty(2, 3, 64 // s, 96 // s, 8, requires_grad=True) for s in STRIDES]
        parts = simple()(raw, torch.empty(7, 6))
        parts.total.backward()
        assert raw[0].grad.shape == raw[0].shape


@pytest.mark.gpu
def test_a_gpu_is_never_waited_for_and_gives_the_same_values() -> None:
    targets = torch.cat([one_target(0.3 + 0.02 * i, 0.5, 0.1, 0.2, cls=i % 3) for i in range(20)])
    expected = simple()(level_outputs(), targets)
    criterion, targets = simple().cuda(), targets.cuda()
    raw = [r.cuda().requires_grad_() for r in level_outputs()]
    criterion(raw, targets).total.backward()  # whatever is set up at the first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts = criterion(raw, targets)
        parts.total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert parts.items.tolist() == pytest.approx(expected.items.tolist(), rel=1e-5)


def test_levels_and_strides_must_agree() -> None:
    with pytest.raises(ValueError, match="3 levels of anchors but 2 strides"):
        DetectionLoss(ANCHORS, [8, 16], 3, Hyp())
