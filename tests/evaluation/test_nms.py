"""NMS against upstream's kept rows, and the promises upstream does not make; each test by both ways of going through a
batch, image by image as on a CPU and all at once as on a GPU."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import batched_nms, box_iou

from utils import batched_nms as at_once_module
from utils import nms as nms_module
from utils.batched_nms import greedy, recorded_step
from utils.cuda_graphs import CudaGraphs
from utils.errors import ConfigError
from utils.nms import non_max_suppression

REFERENCE = Path(__file__).parents[1] / "reference"
CASES = json.loads((REFERENCE / "nms.json").read_text())


@pytest.fixture(params=["image by image", "at once"], autouse=True)
def way(request, monkeypatch):
    monkeypatch.setattr(nms_module, "_goes_at_once", lambda device: request.param == "at once")
    return request.param


@pytest.fixture(scope="module")
def arrays():
    return dict(np.load(REFERENCE / "nms.npz"))


@pytest.mark.parametrize("name", CASES)
def test_equals_reference_and_leaves_input_alone(name, arrays):
    case = CASES[name]
    pred = torch.from_numpy(arrays[case["input"]])
    before = pred.clone()
    labels = [torch.from_numpy(arrays[f"{name}/labels0"]), torch.zeros(0, 5)] if name == "hybrid_labels" else ()
    out = non_max_suppression(pred, **case["kwargs"], labels=labels)
    assert torch.equal(pred, before)
    for i, detections in enumerate(out):
        assert detections.dtype == torch.float32
        expected = torch.from_numpy(arrays[f"{name}/out{i}"])
        assert torch.allclose(in_order(detections), in_order(expected), atol=1e-4)


def in_order(detections):
    """Rows by falling score; equal scores (two hybrid labels have 1.0) by class."""
    return torch.from_numpy(detections.numpy()[np.lexsort((detections[:, 5], -detections[:, 4]))])


def box(cx, cy, score, nc=2, cls=0, size=10.0):
    row = torch.zeros(5 + nc)
    row[:4] = torch.tensor([cx, cy, size, size])
    row[4], row[5 + cls] = score, 1.0
    return row


def test_no_predictions_and_no_images():
    assert non_max_suppression(torch.zeros(0, 5, 7)) == []
    assert [tuple(d.shape) for d in non_max_suppression(torch.zeros(2, 0, 7))] == [(0, 6), (0, 6)]
    assert [tuple(d.shape) for d in non_max_suppression(torch.zeros(1, 4, 7), multi_label=True)] == [(0, 6)]


def test_threshold_is_strict():
    pred = box(20, 20, 0.25)[None, None]
    assert len(non_max_suppression(pred, conf_thres=0.25)[0]) == 0
    assert len(non_max_suppression(pred, conf_thres=0.249)[0]) == 1


def test_non_finite_rows_are_left_out():
    bad_box, bad_score = box(20, 20, 0.9), box(60, 20, 0.9)
    bad_box[2], bad_score[5] = float("inf"), float("nan")
    pred = torch.stack((bad_box, bad_score, box(100, 20, 0.8)))[None]
    for multi_label in (False, True):
        (out,) = non_max_suppression(pred, multi_label=multi_label)
        assert out.tolist() == [pytest.approx([95, 15, 105, 25, 0.8, 0])]


def test_classes_stay_apart_in_images_wider_than_the_offset():
    # class 0 at x = 7680 + 100 and class 1 at x = 100 would coincide with a fixed offset of 7680
    pred = torch.stack((box(7780, 50, 0.9, cls=0), box(100, 50, 0.8, cls=1)))[None]
    assert len(non_max_suppression(pred)[0]) == 2


def test_bound_on_candidates_keeps_the_best(monkeypatch):
    monkeypatch.setattr(nms_module, "MAX_CANDIDATES", 3)
    pred = torch.stack([box(50 * i, 20, 0.3 + 0.1 * i) for i in range(6)])[None]
    (out,) = non_max_suppression(pred)
    assert out[:, 4].tolist() == pytest.approx([0.8, 0.7, 0.6])


@pytest.mark.parametrize("block", [1, 64, 5000])
@pytest.mark.parametrize("max_det", [1, 7, 300])
def test_blocks_change_nothing(monkeypatch, block, max_det):
    generator = torch.Generator().manual_seed(1)
    pred = torch.rand(2, 200, 9, generator=generator)
    pred[..., :4] *= 100
    monkeypatch.setattr(nms_module, "BLOCK", block)
    monkeypatch.setattr(at_once_module, "BLOCK", block)
    monkeypatch.setattr(at_once_module, "MOST_PAIRS", 500_000)  # images in portions, or one by one
    out = non_max_suppression(pred, 0.01, 0.5, multi_label=True, max_det=max_det)
    for rows, mine in zip(pred, out):
        scores = rows[:, 5:] * rows[:, 4:5]
        row, cls = (scores > 0.01).nonzero(as_tuple=True)
        boxes = torch.cat((rows[row, :2] - rows[row, 2:4] / 2, rows[row, :2] + rows[row, 2:4] / 2), 1)
        kept = batched_nms(boxes, scores[row, cls], cls, 0.5)[:max_det]
        assert torch.allclose(mine[:, :4], boxes[kept]) and torch.equal(mine[:, 5], cls[kept].float())


def chain(length, step=4.0):
    """Boxes in a row, each overlapping its neighbours only: every second one stays, and each depends on all before."""
    return torch.stack([box(20 + step * i, 20, 0.9 - 0.001 * i) for i in range(length)])


def test_long_chains_of_suppression():
    (out,) = non_max_suppression(chain(101)[None], iou_thres=0.4)  # neighbours: 6/14, next but one: 2/18
    assert out[:, 4].tolist() == pytest.approx([0.9 - 0.001 * i for i in range(0, 101, 2)])


def test_images_do_not_meet():
    """Images with many, few and no boxes in one batch, equal to each alone."""
    generator = torch.Generator().manual_seed(2)
    pred = torch.rand(5, 300, 8, generator=generator)
    pred[..., :4] *= 80
    pred[1, :, 4] = 0
    pred[3, 5:, 4] = 0
    together = non_max_suppression(pred, 0.1, 0.5, multi_label=True, max_det=40)
    for image, rows in zip(pred, together):
        (alone,) = non_max_suppression(image[None], 0.1, 0.5, multi_label=True, max_det=40)
        assert torch.equal(rows, alone)
    assert [len(rows) for rows in together][1] == 0 and len(together[0]) == 40


def like_a_graph(function, *tensors):
    """As utils.cuda_graphs.CudaRecorder, without a GPU: always the same memory for what goes in and what comes out."""
    held, written = [tensor.clone() for tensor in tensors], []

    def replay(*tensors):
        for place, tensor in zip(held, tensors, strict=True):
            if tensor is not place:
                place.copy_(tensor)
        output = function(*held)
        if not written:
            written.extend(output)
        for place, tensor in zip(written, output, strict=True):
            if tensor is not place:
                place.copy_(tensor)
        return tuple(written)

    return replay


def test_steps_in_a_graph_find_the_same(way, monkeypatch):
    """Several batches through a graph of each size; a long chain takes more rounds than it has."""
    monkeypatch.setattr(at_once_module, "BLOCK", 32)
    monkeypatch.setattr(at_once_module, "LOOK", 2)
    generator = torch.Generator().manual_seed(3)
    step = recorded_step(0.4, 30, partial(CudaGraphs, record=like_a_graph, record_at=2))
    batches = [torch.rand(count, 300, 8, generator=generator) for count in (3, 3, 2, 3, 2)]
    for pred in batches:
        pred[..., :4] *= 120
        pred[0, 200:, 4] = 0
    for pred in (*batches, chain(101)[None].repeat(3, 1, 1)):
        settings = dict(conf_thres=0.1, iou_thres=0.4, max_det=30, multi_label=True)
        by_graph, launched = (non_max_suppression(pred, **settings, recorded=way) for way in (step, None))
        for mine, plain in zip(by_graph, launched, strict=True):
            assert torch.equal(mine, plain) and len(mine)
    assert way == "image by image" or len(step.run._graphs) == 2


def test_a_step_of_other_thresholds_is_refused(way):
    pred = torch.rand(2, 50, 8)
    for iou_thres, max_det in ((0.5, 30), (0.4, 10)):
        step = recorded_step(iou_thres, max_det, lambda step: step)
        if way == "at once":
            with pytest.raises(ValueError, match=f"recorded for {iou_thres}, {max_det}, not 0.4, 30"):
                non_max_suppression(pred, 0.1, 0.4, max_det=30, recorded=step)


def test_no_limit_on_detections_takes_no_more_memory():
    pred = torch.rand(2, 900, 7, generator=torch.Generator().manual_seed(4))
    pred[..., :2] *= 3000
    unlimited = non_max_suppression(pred, 0.01, 0.5, max_det=10**9)
    assert all(map(torch.equal, unlimited, non_max_suppression(pred, 0.01, 0.5, max_det=900)))
    assert min(map(len, unlimited)) > 300


@pytest.mark.parametrize("iou_thres", [0.6, 0.7, 0.5, 0.3])
def test_an_overlap_at_the_threshold_is_decided_as_by_torchvision(iou_thres):
    """Which does not round the threshold to float32: 6 / 10 in float32 is above 0.6."""
    long, short = torch.tensor([5.0, 5, 10, 1]), torch.tensor([5.0, 5, 10 * iou_thres, 1])
    rows = torch.cat((torch.stack((long, short)), torch.tensor([[0.9, 1, 0], [0.8, 1, 0]])), 1)
    with_torchvision = batched_nms(corners(rows), rows[:, 4], torch.zeros(2), iou_thres)
    for out in non_max_suppression(rows[None].repeat(2, 1, 1), 0.1, iou_thres):
        assert len(out) == len(with_torchvision)


def corners(rows):
    return torch.cat((rows[:, :2] - rows[:, 2:4] / 2, rows[:, :2] + rows[:, 2:4] / 2), 1)


def test_half_precision_input_gives_float32():
    (out,) = non_max_suppression(box(20, 20, 0.5)[None, None].half())
    assert out.dtype == torch.float32 and len(out) == 1


@pytest.mark.parametrize(
    "bad", [{"conf_thres": 1.5}, {"iou_thres": -0.1}, {"conf_thres": float("nan")}, {"max_det": 0}]
)
def test_bad_thresholds_are_one_line(bad):
    with pytest.raises(ConfigError, match=f"--{next(iter(bad)).replace('_', '-')}"):
        non_max_suppression(torch.zeros(1, 1, 7), **bad)


def test_the_kernel_comes_without_the_package_around_it():
    code = (
        "import sys, torch; from utils.nms import non_max_suppression\n"
        "rows = torch.tensor([[[9.0, 9, 4, 4, 0.9, 0.9], [9, 9, 4, 4, 0.8, 0.8]]])\n"
        "assert len(non_max_suppression(rows)[0]) == 1 and 'torchvision' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_a_library_of_its_own_the_package_is_imported(monkeypatch):
    monkeypatch.setattr(nms_module, "find_spec", lambda name: None)
    boxes, scores = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 29, 29]]), torch.tensor([0.5, 0.9, 0.1])
    kernel = nms_module._kernel.__wrapped__()
    assert kernel.__module__.startswith("torchvision")
    assert kernel(boxes, scores, 0.5).tolist() == nms_module._kernel()(boxes, scores, 0.5).tolist() == [1, 2]


@pytest.mark.parametrize("length", [8, 24, 21])
@pytest.mark.parametrize("kept", [0, 2])
def test_boxes_that_count_may_be_told_by_a_part_of_a_tensor(length: int, kept: int) -> None:
    boxes, valid = torch.rand(2, length, 4).cumsum(2), (torch.rand(2, length + 3) > 0.3)[:, 3:]
    stays, final = greedy(boxes[:, :kept] + 10, boxes, valid, 0.4, length)  # those kept are elsewhere
    expected = torch.zeros_like(valid)
    for image, overlap in enumerate(box_iou(each, each) > 0.4 for each in boxes):
        for i in range(length):
            expected[image, i] = valid[image, i] and not (expected[image, :i] & overlap[i, :i]).any()
    assert final and torch.equal(stays, expected) and stays.sum() < valid.sum()
