"""Whole models: state-dict names, outputs equal to upstream's, Detect's decoding."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from models.ensemble import Ensemble
from models.head import Detect
from models.tta import augmented_forward
from models.yolo import DetectionModel
from tests.models.reference import fill, image, stored

OTHERS = stored("forward_other_models.json")


@pytest.fixture(scope="module")
def filled() -> DetectionModel:
    return fill(DetectionModel("yolov5n.yaml"))


@pytest.mark.parametrize("name", stored("state_dict_keys.json"))
def test_state_dict_names_shapes_and_order(name: str) -> None:
    with torch.device("meta"):
        model = DetectionModel(f"{name}.yaml")
    found = [[key, list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in model.state_dict().items()]
    assert found == stored("state_dict_keys.json")[name]


@torch.no_grad()
def test_yolov5n_equals_reference(filled: DetectionModel) -> None:
    expected = stored("forward_yolov5n.npz")
    decoded, raw = filled(image((1, 3, 64, 96)))
    for level, y in enumerate(raw):
        np.testing.assert_allclose(y.numpy(), expected[f"raw{level}"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(decoded.numpy(), expected["decoded"], rtol=1e-3, atol=0.02)


@torch.no_grad()
def test_every_layer_equals_reference(filled: DetectionModel) -> None:
    outputs = {}
    handles = [m.register_forward_hook(lambda m, _, y: outputs.update({m.i: y})) for m in filled.model[:-1]]
    filled(image((1, 3, 64, 96)))
    for handle in handles:
        handle.remove()
    for index, shape, mean, std, *_ in stored("forward_yolov5n_layers.json")["layers"]:
        if index in outputs:
            y = outputs[index].double()
            assert list(y.shape) == shape
            assert [y.mean().item(), y.std(unbiased=False).item()] == pytest.approx([mean, std], rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_other_models_equal_reference(name: str) -> None:
    case = OTHERS[name]
    model = fill(DetectionModel(f"{name}.yaml", nc=case["nc"]), case["g"], case["bias_amp"])
    decoded, raw = model(image(case["input"]))
    assert list(decoded.shape) == case["out_shape"]
    assert decoded.double().mean().item() == pytest.approx(case["mean"], rel=1e-3)
    assert [y.double().std().item() for y in raw] == pytest.approx(case["raw_std"], rel=1e-3)
    for row, key in ((0, "first"), (decoded.shape[1] // 2, "mid"), (-1, "last")):
        np.testing.assert_allclose(decoded[0, row].numpy(), case[key], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_augmented_forward_equals_reference(filled: DetectionModel) -> None:
    expected = stored("forward_yolov5n.npz")["tta_decoded"]
    np.testing.assert_allclose(augmented_forward(filled, image((1, 3, 64, 96))).numpy(), expected, rtol=1e-3, atol=0.02)


@torch.no_grad()
def test_ensemble_puts_rows_side_by_side(filled: DetectionModel) -> None:
    other = DetectionModel("yolov5-p34.yaml").eval()
    both, x = Ensemble([other, filled]), image((1, 3, 64, 96))
    decoded, raw = both(x)
    assert raw is None and torch.equal(decoded, torch.cat((other(x)[0], filled(x)[0]), 1))
    assert both.stride.tolist() == [8, 16, 32] and both.names is other.names
    assert augmented_forward(both, x).shape[1] == sum(augmented_forward(m, x).shape[1] for m in (other, filled))


def test_training_returns_logits_only() -> None:
    raw = DetectionModel("yolov5n.yaml", nc=2)(torch.rand(2, 3, 64, 32))
    assert [tuple(y.shape) for y in raw] == [(2, 3, 8, 4, 7), (2, 3, 4, 2, 7), (2, 3, 2, 1, 7)]


def test_attributes_that_scripts_read() -> None:
    model = DetectionModel("yolov5n.yaml", nc=2)
    assert model.names == {0: "0", 1: "1"} and model.nc == 2 and model.yaml["nc"] == 2 and model.yaml["ch"] == 3
    assert type(model.yaml) is dict and model.yaml_file == "yolov5n.yaml"
    assert model.stride.tolist() == [8, 16, 32] and model.save == [4, 6, 10, 14, 17, 20, 23]
    assert model.detect is model.model[-1] and "model.24.stride" not in model.state_dict()
    assert (model.model[12].i, model.model[12].f, model.model[12].np) == (12, [-1, 6], 0)


def test_description_rebuilds_the_model() -> None:
    model = DetectionModel("yolov5n-dcn.yaml", nc=2, anchors=4.2)
    again = DetectionModel(copy.deepcopy(model.yaml))
    assert again.yaml == model.yaml and again.detect.na == 4
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_building_leaves_norms_and_random_state_of_running_statistics_alone() -> None:
    model = DetectionModel("yolov5n.yaml")
    bn = model.model[0].bn
    assert model.training and not bn.running_mean.any() and bn.num_batches_tracked == 0


def test_activation_belongs_to_one_model() -> None:
    leaky = DetectionModel("hub/yolov5s-LeakyReLU.yaml")
    kinds = {type(m).__name__ for m in leaky.modules()}
    assert "LeakyReLU" in kinds and "SiLU" not in kinds
    assert "LeakyReLU" not in {type(m).__name__ for m in DetectionModel("yolov5n.yaml").modules()}


# ---- Detect


def detect(nc: int = 2) -> Detect:
    head = Detect(nc, [[10, 13, 16, 30], [30, 61, 62, 45]], [4, 8])
    head.set_anchors([[10, 13, 16, 30], [30, 61, 62, 45]], [8.0, 16.0])
    return head


def test_decode_by_hand() -> None:
    head = detect().eval()
    raw = [torch.randn(1, 2, 3, 4, 7), torch.randn(1, 2, 2, 2, 7)]
    decoded, s = head.decode(raw), raw[0].sigmoid()
    anchor, row, column = 1, 2, 3
    x, y, w, h, *scores = decoded[0, anchor * 12 + row * 4 + column].tolist()
    cell = s[0, anchor, row, column]
    assert [x, y] == pytest.approx([(2 * cell[0] - 0.5 + column).item() * 8, (2 * cell[1] - 0.5 + row).item() * 8])
    assert [w, h] == pytest.approx([(2 * cell[2]).item() ** 2 * 16, (2 * cell[3]).item() ** 2 * 30])
    assert scores == pytest.approx(cell[4:].tolist())
    assert decoded.shape == (1, 24 + 8, 7)


def test_decode_is_float32_for_half_models() -> None:
    raw = [torch.randn(1, 2, 3, 4, 7), torch.randn(1, 2, 2, 2, 7)]
    low = [y.bfloat16() for y in raw]
    head = detect().bfloat16()
    assert head.decode(low).dtype == torch.float32
    assert torch.allclose(head.decode(low), detect().decode([y.float() for y in low]))


def test_anchors_are_put_in_the_order_of_the_strides() -> None:
    head = detect()
    straight = head.anchors.clone()
    head.set_anchors([[30, 61, 62, 45], [10, 13, 16, 30]], [8.0, 16.0])
    assert torch.equal(head.anchors, straight)
    assert straight[0, 0].tolist() == [10 / 8, 13 / 8]


def test_biases_start_at_the_expected_rates() -> None:
    head = detect()
    before = [conv.bias.detach().clone().view(2, 7) for conv in head.m]
    head.initialize_biases([8.0, 16.0])
    for conv, start, stride in zip(head.m, before, (8, 16)):
        change = (conv.bias.detach().view(2, 7) - start)[0]
        objectness, per_class = np.log(8 / (640 / stride) ** 2), np.log(0.6 / 1.00001)
        assert change.tolist() == pytest.approx([0, 0, 0, 0, objectness, per_class, per_class], abs=1e-5)
