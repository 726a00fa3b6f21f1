"""benchmarks/dcn.py as far as a CPU goes: its reference, its floors, its made-up input, its one line without CUDA."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch

from benchmarks import dcn
from models.ops.deform_conv import deform_conv2d
from utils.files import ROOT

SMALL = dcn.Layer(4, 6, 12)


@pytest.mark.parametrize("spread", [0.0, 1.5, 8.0])
def test_the_plain_reference_is_the_op(spread: float) -> None:
    inputs = dcn.make_inputs(SMALL, 2, torch.float64, spread, "cpu")
    mine, theirs = dcn.plain(*inputs.leaves), deform_conv2d(*inputs.leaves, stride=2, padding=1)
    assert torch.allclose(mine, theirs, atol=1e-12)
    grad = torch.randn_like(mine)
    pairs = zip(torch.autograd.grad(mine, inputs.leaves, grad), torch.autograd.grad(theirs, inputs.leaves, grad))
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in pairs)


def test_errors_are_small_and_relative() -> None:
    inputs = dcn.make_inputs(SMALL, 1, torch.float32, 1.5, "cpu")
    found = dcn.errors(partial(dcn.op, backend="torchvision"), lambda i: dcn.plain(*i.leaves), inputs, "leaves")
    assert len(found) == 6 and max(found) < 1e-5
    assert len(dcn.errors(dcn.conv, dcn.conv, inputs, "conv_leaves")) == 4


def test_the_block_has_offsets_of_the_spread_asked_for() -> None:
    block = dcn.make_block(dcn.Layer(16, 8, 32), 3.0, device="cpu")
    assert block.backend == "auto"
    with torch.no_grad():
        raw = block.conv_offset_mask(torch.randn(4, 16, 32, 32))
    offset, logits = raw.split([18, 9], 1)
    assert 2.5 < float(offset.std()) < 3.5 and 0.8 < float(logits.std()) < 1.2


def test_floors_are_those_of_the_fact_sheet() -> None:
    found = [tuple(round(value, 2) for value in dcn.floors(layer, 16)) for layer in dcn.LAYERS]
    assert found == [(0.14, 0.24), (0.12, 0.24), (0.12, 0.24)]
    assert dcn.floors(dcn.LAYERS[0], 1)[0] == pytest.approx(dcn.floors(dcn.LAYERS[0], 16)[0] / 16)


def test_a_made_up_batch_trains() -> None:
    from benchmarks.made_up import made_up_training
    from benchmarks.train_throughput import rate
    from utils.config import TrainConfig

    cfg = TrainConfig(cfg="yolov5n-dcn.yaml", data="bccd.yaml", batch_size=2, imgsz=64)
    learner, batch = made_up_training(cfg, torch.device("cpu"))
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert rate(learner, iter([batch] * 2), warmup=1) > 0


def test_ratios_are_to_the_plain_model_above() -> None:
    times = {"s": (10.0, 5.0), "s-dcn": (12.0, 6.5), "x": (20.0, 20.0), "x-dcn": (30.0, 22.0)}
    rows = [[name, "auto" if "dcn" in name else "-", 0, *pair, 0] for name, pair in times.items()]
    ratios = [row[-2:] for row in dcn.with_ratio(rows)]
    assert ratios == [["1.00", "1.00"], ["1.20", "1.30"], ["1.00", "1.00"], ["1.50", "1.10"]]


def test_without_cuda_it_is_one_line() -> None:
    command = [sys.executable, "-m", "benchmarks.dcn"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr
