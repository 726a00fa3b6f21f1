"""The watch on deformable layers: its numbers against a written-out loop, its warnings, and that it costs nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from models.common import DCN, DCNConv
from utils.dcn_watch import DcnWatch


def filled(layer: DCN, scale: float) -> DCN:
    with torch.no_grad():
        layer.conv_offset_mask.weight.normal_(0, scale)
        layer.conv_offset_mask.bias.normal_(0, scale)
    return layer


def written_out(layer: DCN, x: torch.Tensor) -> dict[str, float]:
    """The statistics by plain loops over one image, groups, taps and outputs."""
    branch = layer.conv_offset_mask
    out = branch(x).double()
    (kh, kw), (sy, sx) = branch.kernel_size, branch.stride
    (py, px), (ey, ex) = branch.padding, branch.dilation
    groups = out.shape[1] // (3 * kh * kw)
    lengths, outside, rest = [], [], []
    for b in range(out.shape[0]):
        for pair in range(groups * kh * kw):
            i, j = divmod(pair % (kh * kw), kw)
            for r in range(out.shape[2]):
                for c in range(out.shape[3]):
                    dy, dx = out[b, 2 * pair, r, c].item(), out[b, 2 * pair + 1, r, c].item()
                    y, x0 = r * sy - py + i * ey, c * sx - px + j * ex
                    lengths.append(math.hypot(dy, dx))
                    height, width = x.shape[2:]
                    outside.append(not (-1 < y + dy < height and -1 < x0 + dx < width))
                    rest.append(not (-1 < y < height and -1 < x0 < width))
    mask = out[:, 2 * out.shape[1] // 3 :].sigmoid().mean().item()
    mean = sum(lengths) / len(lengths)
    share = [sum(flags) / len(flags) for flags in (outside, rest)]
    return dict(
        zip(
            ("mean_offset", "max_offset", "outside", "outside_at_rest", "mean_mask"), (mean, max(lengths), *share, mask)
        )
    )


@pytest.mark.parametrize(
    ("k", "s", "p", "d", "groups"), [(3, 2, 1, 1, 1), (3, 1, 2, 2, 2), ((1, 3), 1, (0, 1), 1, 1), (5, 3, 1, 1, 4)]
)
def test_statistics_are_the_written_out_ones(k, s, p, d, groups) -> None:
    layer = filled(DCN(4, 8, k, s, p, d, offset_groups=groups), 0.7)
    x = torch.randn(2, 4, 7, 10)
    watch = DcnWatch(nn.Sequential(layer))
    with watch.step():
        layer(x)
    found = watch.summary()["0"]
    expected = written_out(layer, x)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert (found["height"], found["width"]) == (7, 10)
    lengths = watch.lengths()["0"]
    assert 0 < len(lengths) <= 4096 and lengths.max() <= expected["max_offset"] + 1e-5


@pytest.mark.parametrize(("size", "share"), [(48, 0.03), (24, 0.06), (12, 0.11), (6, 0.21)])
def test_padding_alone_is_no_reason_to_warn(size: int, share: float) -> None:
    layer = DCN(4, 4, 3, 2)
    watch = DcnWatch(nn.Sequential(layer))
    with watch.step():
        layer(torch.randn(1, 4, size, size))
    summary = watch.summary()
    assert summary["0"]["outside"] == pytest.approx(summary["0"]["outside_at_rest"], abs=1e-6)
    assert summary["0"]["outside"] == pytest.approx(share, abs=0.006)
    assert summary["0"]["mean_mask"] == 0.5
    assert watch.warnings(summary) == []


def test_an_escaping_layer_is_named_once() -> None:
    model = nn.Sequential(DCNConv(3, 4, 3, 2), DCN(4, 4, 3, 2))
    with torch.no_grad():
        model[1].conv_offset_mask.bias[:18] = 20.0
    watch = DcnWatch(model, every=1)
    assert list(watch.layers) == ["0.conv", "1"]
    with watch.step():
        model(torch.randn(1, 3, 32, 64))
    lines = watch.warnings(watch.summary(), offset_lr=0.5)
    assert lines == [
        "DCN layer 1: 100% of its samples lie outside the image (mean |offset| 28.3 px on a 32x16 map): it is "
        "escaping; lower --dcn-offset-lr (now 0.5) or use --clip-grad"
    ]
    with watch.step():
        model(torch.randn(1, 3, 32, 64))
    assert watch.warnings(watch.summary()) == []


def test_nan_offsets_count_as_escaped() -> None:
    branch = nn.Conv2d(2, 27, 3, padding=1)
    nn.init.constant_(branch.bias, float("nan"))
    model = nn.Module()
    model.conv_offset_mask = branch
    watch = DcnWatch(model)
    with watch.step():
        branch(torch.zeros(1, 2, 8, 8))
    summary = watch.summary()
    assert summary[""]["outside"] == 1.0
    assert len(watch.warnings(summary)) == 1


def test_means_over_several_samplings_and_a_fresh_start_after_reading() -> None:
    layer = filled(DCN(2, 2), 0.5)
    watch = DcnWatch(nn.Sequential(layer), every=1)
    single = []
    images = [torch.randn(1, 2, 8, 8) for _ in range(2)]
    for image in images:
        with watch.step():
            layer(image)
        single.append(watch.summary()["0"])
    for image in images:
        with watch.step():
            layer(image)
    both = watch.summary()["0"]
    assert both["mean_offset"] == pytest.approx((single[0]["mean_offset"] + single[1]["mean_offset"]) / 2)
    assert both["max_offset"] == pytest.approx(max(s["max_offset"] for s in single))
    assert watch.summary() == {}


def test_only_every_nth_step_is_measured() -> None:
    layer = DCN(2, 2)
    watch = DcnWatch(nn.Sequential(layer), every=3)
    measured = []
    for step in range(7):
        nn.init.constant_(layer.conv_offset_mask.bias, step)
        with watch.step() as hooked:
            measured.append(hooked)
            layer(torch.zeros(1, 2, 8, 8))
    assert measured == [True, False, False, True, False, False, True]
    watch.start_epoch()
    with watch.step() as hooked:
        assert hooked
    summary = watch.summary()["0"]
    assert summary["mean_offset"] == pytest.approx((0 + 3 + 6) / 3 * math.sqrt(2))
    assert summary["max_offset"] == pytest.approx(6 * math.sqrt(2))


def test_outside_of_a_step_nothing_is_hooked() -> None:
    layer = DCN(2, 2)
    watch = DcnWatch(nn.Sequential(layer))
    with pytest.raises(RuntimeError, match="stop"), watch.step():
        raise RuntimeError("stop")
    layer(torch.zeros(1, 2, 4, 4))
    assert watch.summary() == {}
    assert not layer.conv_offset_mask._forward_hooks


def test_watching_leaves_the_gradients_alone() -> None:
    layer, x = filled(DCN(2, 2), 0.3), torch.randn(1, 2, 8, 8)
    layer(x).sum().backward()
    plain = layer.weight.grad.clone()
    layer.zero_grad()
    watch = DcnWatch(layer)
    with watch.step():
        layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, plain)
    assert not any(t.requires_grad for t in watch._sums.values())


def test_a_model_without_deformable_layers_has_nothing_to_watch() -> None:
    watch = DcnWatch(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with watch.step() as measured:
        assert not measured
    assert watch.layers == {} and watch.summary() == {} and watch.warnings({}) == []


def test_what_it_keeps_is_allocated_before_the_step() -> None:
    """Inside, memory may be that of a CUDA graph (tests/learning/test_graphs.py)."""
    layer = filled(DCN(4, 8, 3, 1, 1), 0.7)
    watch = DcnWatch(nn.Sequential(layer))
    with watch.step():
        before = {id(value) for held in vars(watch).values() if isinstance(held, dict) for value in held.values()}
        layer(torch.randn(2, 4, 7, 10))
    after = [value for held in vars(watch).values() if isinstance(held, dict) for value in held.values()]
    kept = [value for value in after if isinstance(value, torch.Tensor)]
    assert len(kept) == 2 and all(id(value) in before for value in kept)
    watch.summary()
    assert watch.summary() == {}
