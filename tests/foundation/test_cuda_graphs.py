"""Inference as CUDA graphs: which shapes are recorded, what happens where none can be; on a GPU the same boxes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.api import Detector
from models.surgery import fuse
from models.yolo import DetectionModel
from utils.cuda_graphs import MOST_SHAPES, RECORD_AT, CudaGraphs
from utils.device import graphs_allowed
from utils.errors import ConfigError


class Doubles(nn.Module):
    """Counts the passes that are no replays."""

    passes = 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        return images * 2


class Recorder:
    """Stands in for CUDA: remembers what was recorded and replayed."""

    def __init__(self) -> None:
        self.recorded: list[tuple[int, ...]] = []
        self.replays = 0

    def __call__(self, function: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
        self.recorded.append(tuple(images.shape))

        def replay(images: Tensor) -> Tensor:
            self.replays += 1
            return images * 2

        return replay


@pytest.fixture
def graphs() -> CudaGraphs:
    return CudaGraphs(Doubles(), Recorder())


def test_a_shape_is_recorded_when_it_comes_again(graphs: CudaGraphs) -> None:
    for number in range(1, 6):
        images = torch.full((2, 3, 4, 4), float(number))
        assert torch.equal(graphs(images), images * 2)
        assert graphs._record.recorded == ([(2, 3, 4, 4)] if number >= RECORD_AT else [])
    assert graphs._function.passes == RECORD_AT - 1 and graphs._record.replays == 6 - RECORD_AT


def test_precision_belongs_to_the_shape(graphs: CudaGraphs) -> None:
    for _ in range(RECORD_AT):
        graphs(torch.ones(1, 3, 4, 4))
        graphs(torch.ones(1, 3, 4, 4, dtype=torch.float64))
        with torch.autocast("cpu", torch.bfloat16):
            graphs(torch.ones(1, 3, 4, 4))
    assert len(graphs._record.recorded) == 3


def test_the_graphs_that_are_kept_are_few(graphs: CudaGraphs) -> None:
    """The one not used for longest goes, and has to come as often again."""
    shapes = [(1, 3, 4, side) for side in range(1, MOST_SHAPES + 2)]
    for shape in shapes:
        for _ in range(RECORD_AT):
            graphs(torch.ones(shape))
        graphs(torch.ones(shapes[0]))  # used all the time
    assert len(graphs._graphs) == MOST_SHAPES and graphs._record.recorded == shapes
    before = graphs._function.passes
    graphs(torch.ones(shapes[0]))
    assert graphs._function.passes == before
    graphs(torch.ones(shapes[1]))
    assert graphs._function.passes == before + 1 and graphs._record.recorded == shapes


def test_a_model_that_cannot_be_recorded_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(model: nn.Module, images: Tensor) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphs = CudaGraphs(Doubles(), refuse)
    for _ in range(2 * RECORD_AT + 1):
        assert graphs(torch.ones(1, 3, 4, 4)).sum() == 96
    [record] = caplog.records
    assert "launched as usual (operation not permitted when stream is capturing)" in record.message


def test_memory_that_runs_out_while_recording_is_no_obstacle_of_the_model() -> None:
    def full(model: nn.Module, images: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    graphs = CudaGraphs(Doubles(), full, record_at=1)
    with pytest.raises(torch.OutOfMemoryError):
        graphs(torch.ones(1, 3, 4, 4))


def test_where_graphs_are_used() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert graphs_allowed("auto", cuda) and graphs_allowed("on", cuda) and not graphs_allowed("off", cuda)
    assert not graphs_allowed("auto", cpu) and not graphs_allowed("auto", cuda, "something")
    with pytest.raises(ConfigError, match="--cuda-graphs on: they need a CUDA device, not cpu"):
        graphs_allowed("on", cpu)
    with pytest.raises(ConfigError, match="--cuda-graphs on: something"):
        graphs_allowed("on", cuda, "something")


def detections(name: str, cuda_graphs: bool, half: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model = fuse(DetectionModel(name, nc=2).eval()).to(memory_format=torch.channels_last)
    detector = Detector(model, torch.device("cuda", 0), half, cuda_graphs=cuda_graphs, conf=0.001)
    found = []
    for number in range(12):
        rng = np.random.default_rng(number)
        picture = rng.integers(0, 255, (96, (128, 96)[number % 2], 3), dtype=np.uint8)
        found += detector.detect([picture], (128, 128))[0]
    assert not cuda_graphs or len(detector._graphs._graphs) == 2
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", ["yolov5n.yaml", "yolov5n-dcn.yaml"])
def test_replays_find_the_same_boxes(name: str, half: bool) -> None:
    launched, replayed = detections(name, False, half), detections(name, True, half)
    assert sum(map(len, launched)) > 100
    for before, after in zip(launched, replayed):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
def test_weights_that_change_in_place_are_followed() -> None:
    """The average under training, validated every epoch."""
    model = DetectionModel("yolov5n.yaml", nc=2).eval().cuda()
    graphs, images = CudaGraphs(model), torch.rand(2, 3, 64, 64, device="cuda")
    with torch.inference_mode():
        for _ in range(RECORD_AT + 1):
            graphs(images)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        torch.testing.assert_close(graphs(images)[0], model(images)[0])


@pytest.mark.gpu
def test_a_layer_that_waits_for_the_device() -> None:
    class Waits(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images * float(images.mean() < 9)

    graphs, images = CudaGraphs(Waits()), torch.ones(1, 3, 8, 8, device="cuda")
    for _ in range(RECORD_AT + 2):
        assert torch.equal(graphs(images), images)
    assert not graphs._enabled and torch.rand(8, device="cuda").unique().numel() > 1
