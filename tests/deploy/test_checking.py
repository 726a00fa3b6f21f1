"""A file that computes something else is found out."""

from __future__ import annotations

import pytest
import torch

from deploy.checking import detection_difference, difference, input_batch, refuse_if_far
from deploy.contract import from_detections
from utils.errors import ExportError
from utils.nms import non_max_suppression


def predictions(count: int = 400) -> torch.Tensor:
    """(2, count, 8): boxes on a 320-pixel image with scores from 0 to 1."""
    rows = torch.rand(2, count, 8)
    rows[..., :2] *= 320
    rows[..., 2:4] = rows[..., 2:4] * 60 + 4
    return rows


def test_equal_predictions_do_not_differ() -> None:
    rows = predictions()
    found = difference(rows, rows.clone())
    assert (found.box, found.relative, found.score) == (0, 0, 0)
    assert found.boxes == 800


def test_pixels_are_measured_and_related_to_the_box() -> None:
    expected = predictions()
    expected[0, 7] = torch.tensor([100, 100, 64, 16, 1, 1, 1, 1.0])
    found = expected.clone()
    found[0, 7, 0] += 0.5
    far = difference(expected, found)
    assert far.box == pytest.approx(0.5)
    assert far.relative == pytest.approx(0.5 / 64)
    with pytest.raises(ExportError, match="does not compute what the model does: .* 0.5 px"):
        refuse_if_far(far, half=False)
    refuse_if_far(far, half=True)


def test_a_box_that_nobody_sees_is_not_compared() -> None:
    expected = predictions(2000)
    expected[:, 1500:, 4] = 0
    found = expected.clone()
    found[:, 1500:, :4] += 100
    refuse_if_far(difference(expected, found), half=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(value: float) -> None:
    expected = predictions()
    found = expected.clone()
    found[1, 3, 4] = value
    with pytest.raises(ExportError):
        refuse_if_far(difference(expected, found), half=True)


def test_another_shape_is_refused() -> None:
    with pytest.raises(ExportError, match="gives"):
        difference(predictions(), predictions(399))


def test_suppressed_rows_are_compared_box_by_box() -> None:
    expected = predictions()
    rows = torch.cat([
        torch.cat((torch.full((len(each), 1), float(image)), each), 1)
        for image, each in enumerate(non_max_suppression(expected, 0.25, 0.45))
    ])  # fmt: skip
    found = from_detections(rows, 2, 3, most=300)
    assert found.shape == (2, 300, 8)
    assert detection_difference(expected, found, 0.25, 0.45, 100).box < 1e-3
    with pytest.raises(ExportError, match="objects that the model finds"):
        detection_difference(expected, from_detections(rows[::2], 2, 3, most=300), 0.25, 0.45, 100)
    with pytest.raises(ExportError, match="objects that the model does not find, beside 0 that it does"):
        detection_difference(torch.zeros_like(expected), found, 0.25, 0.45, 100)


def test_the_pictures_of_a_batch_differ(picture) -> None:
    batch = input_batch(picture, (96, 128), 3, torch.device("cpu"))
    assert batch.shape == (3, 3, 96, 128)
    assert 0 <= float(batch.min()) and float(batch.max()) <= 1
    assert torch.equal(batch[0], batch[2]) and torch.equal(batch[0], batch[1].flip(-1))
