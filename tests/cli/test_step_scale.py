"""benchmarks.step_scale: exponents, and a point measured in a process of its own."""

from __future__ import annotations

import pytest
import torch

from benchmarks.report import slope
from benchmarks.step_scale import apart, forward_cost, with_slope
from utils.config import TrainConfig


def test_the_slope_is_the_exponent_of_each_column() -> None:
    rows = [[side, 3.0 * side**2, 7.0, 5.0 / side] for side in (160, 320, 640)]
    assert with_slope(rows)[-1] == ["slope", "2.00", "0.00", "-1.00"]


@pytest.mark.parametrize("values", [[1.0], [1.0, 0.0]])
def test_no_slope_where_there_is_none(values: list[float]) -> None:
    assert slope(range(1, len(values) + 1), values) == "-"


def test_more_images_take_more_of_a_fresh_process_each() -> None:
    few, many = (
        apart(forward_cost, TrainConfig(cfg="yolov5n.yaml", batch_size=n, imgsz=64), torch.device("cpu"))
        for n in (1, 64)
    )
    assert many[0] > few[0] > 0
    assert many[1] > few[1] > 0
