"""Where DCN layers sample: places by hand and by the gradient, which knows nothing of the arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.common import DCN, Conv
from models.sampling import look
from models.yolo import DetectionModel
from utils.errors import ConfigError


def with_offsets(layer: DCN, dy: float = 0.0, dx: float = 0.0, logit: float = 0.0) -> DCN:
    """A layer whose taps all move by (dy, dx) input pixels, wherever."""
    with torch.no_grad():
        pairs = layer.conv_offset_mask.bias.numel() // 3
        layer.conv_offset_mask.bias[: 2 * pairs : 2] = dy
        layer.conv_offset_mask.bias[1 : 2 * pairs : 2] = dx
        layer.conv_offset_mask.bias[2 * pairs :] = logit
    return layer


def middle(field: Tensor) -> tuple[float, float]:
    """Centre (y, x) of the box around all pixels that count; pixel 0 has its centre at 0.5."""
    rows, columns = field.nonzero(as_tuple=True)
    return (float(rows.min() + rows.max() + 1) / 2, float(columns.min() + columns.max() + 1) / 2)


def stem() -> nn.Sequential:
    """YOLOv5's first layer (6x6, stride 2, padding 2), then DCN layers of stride 2."""
    torch.manual_seed(0)
    return nn.Sequential(Conv(3, 8, 6, 2, 2), DCN(8, 8, 3, 2), DCN(8, 8, 3, 2)).eval()


def test_places_by_hand() -> None:
    model = stem()
    with_offsets(model[1], dy=1.5, dx=-2.0, logit=2.0)
    sampling = look(model, torch.rand(1, 3, 64, 96))
    first, second = sampling.layers
    assert (first.name, second.name) == ("1", "2")
    assert first.raw.shape == (27, 16, 24) and second.raw.shape == (27, 8, 12)
    # cell i of the 6x6's output sees pixels 2i-2 .. 2i+3, the middle of which is at 2i+1
    assert first.source.places(torch.tensor([0.0, 5.0])).tolist() == [1.0, 11.0]
    cell = torch.tensor([[3, 4]])
    assert first.rest(cell)[0, [0, 4, 8]].tolist() == [[11.0, 15.0], [13.0, 17.0], [15.0, 19.0]]
    points, masks = first.points(cell)
    assert torch.allclose(points[0] - first.rest(cell)[0], torch.tensor([3.0, -4.0]))  # two pixels a cell
    assert torch.allclose(masks, torch.tensor(2.0).sigmoid().expand(1, 9))


@pytest.mark.parametrize("move", [(0.0, 0.0), (1.0, -2.0)])
def test_the_gradient_agrees(move: tuple[float, float]) -> None:
    """The receptive field of an output lies around where the arithmetic puts it, moved when the offsets move."""
    model = stem()
    with_offsets(model[2], *move)
    sampling = look(model, torch.rand(1, 3, 96, 96))
    layer = sampling.layers[-1]
    cell = torch.tensor([5, 6])
    place = layer.target.places(cell.float())
    assert layer.cells(place).tolist() == cell.tolist()
    field = sampling.effective_field(place)
    assert field.shape == (96, 96) and field.max() == 1
    expected = layer.points(cell[None])[0][0].mean(0)
    assert middle(field) == pytest.approx(expected.tolist(), abs=0.01)
    assert torch.allclose(expected - place, 4 * torch.tensor(move))  # four pixels a cell


def test_composed_points() -> None:
    model = stem()
    with_offsets(model[1], dx=1.0, logit=1.0)
    with_offsets(model[2], dy=2.0, logit=-1.0)
    sampling = look(model, torch.rand(1, 3, 96, 96))
    place = sampling.layers[-1].target.places(torch.tensor([6.0, 6.0]))
    points, weights, depth = sampling.cloud(place)
    assert points.shape == (81, 2) and depth == 2
    assert torch.allclose(weights, (torch.tensor(1.0).sigmoid() * torch.tensor(-1.0).sigmoid()).expand(81))
    # the last layer looks 2 cells of 4 pixels lower, the first 1 cell of 2 pixels to the right
    assert torch.allclose(points.mean(0) - place, torch.tensor([8.0, 2.0]), atol=1e-3)


def test_groups_and_cells_beyond_the_border() -> None:
    layer = DCN(4, 4, 3, 1, offset_groups=2)
    sampling = look(nn.Sequential(layer).eval(), torch.rand(1, 4, 10, 12)[:, :4])
    points, masks = sampling.layers[0].points(torch.tensor([[0, 0], [9, 11]]))
    assert points.shape == (2, 18, 2) and masks.shape == (2, 18)
    assert sampling.layers[0].cells(torch.tensor([[-50.0, 500.0]])).tolist() == [[0, 11]]


def test_whole_models_in_the_order_they_run() -> None:
    model = DetectionModel("yolov5n-dcn.yaml", nc=2).eval().requires_grad_(False)
    sampling = look(model, torch.rand(1, 3, 64, 64))
    assert [layer.name for layer in sampling.layers] == ["1", "3", "5"]
    assert [layer.source.step for layer in sampling.layers] == [(2.0, 2.0), (4.0, 4.0), (8.0, 8.0)]
    assert not any(module._forward_hooks for module in model.modules())
    assert sampling.effective_field(torch.tensor([30.0, 30.0])).isfinite().all()


def test_a_model_without_dcn_is_refused() -> None:
    with pytest.raises(ConfigError, match="--show-offsets: this model has no DCN layer"):
        look(DetectionModel("yolov5n.yaml", nc=2), torch.rand(1, 3, 64, 64))


def test_a_cloud_ends_before_it_has_too_many_points() -> None:
    model = nn.Sequential(*(DCN(4, 4, 3, 1, offset_groups=4) for _ in range(4))).eval()
    points, weights, depth = look(model, torch.rand(1, 4, 8, 8)).cloud(torch.tensor([4.0, 4.0]))
    assert depth == 2 and points.shape == (36**2, 2) and weights.shape == (36**2,)
