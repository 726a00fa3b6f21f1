"""What a DCN may be beyond the article's: offset groups, separable and bounded offsets, grouped sampling, and the
``dcn_options`` that make a model's layers so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from models.common import C3DCN, DCN, DCNConv
from models.deform import make_deformable
from models.extra import C3GDCN, GDCNConv
from models.loading import build_or_load, load_model
from models.offsets import SeparableOffsets
from models.sampling import look
from models.surgery import fuse
from models.yolo import DetectionModel
from tests.models.reference import fill, image
from utils.checkpoint import save_checkpoint
from utils.dcn_watch import DcnWatch
from utils.errors import ConfigError
from utils.files import ROOT
from utils.optim import parameter_roles

OPTIONS = {
    "offset groups": {"offset_groups": 4},
    "separable": {"separable": True},
    "bounded": {"bound": 2.0},
    "all": {"offset_groups": 2, "separable": True, "bound": 2.0},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def described(tmp_path: Path, *lines: str, base: str = "yolov5n.yaml") -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join([(ROOT / "models" / base).read_text(), *lines]) + "\n")
    return path


def yaml_of(options: dict) -> str:
    return "dcn_options: {" + ", ".join(f"{key}: {value}" for key, value in options.items()) + "}"


@each_option
def test_every_form_starts_as_half_of_a_convolution(options: dict) -> None:
    layer, x = DCN(8, 12, 3, 2, **options), torch.randn(2, 8, 9, 11)
    plain = nn.functional.conv2d(x, layer.weight / 2, None, 2, 1)
    y = layer(x)
    assert torch.allclose(y, plain, atol=1e-5)
    y.square().sum().backward()
    last = layer.conv_offset_mask
    last = getattr(last, "pointwise", last)
    assert last.weight.grad.abs().sum() > 0 and layer.weight.grad.isfinite().all()


def test_bounded_offsets_stay_within_the_bound_and_masks_are_free() -> None:
    for separable in (False, True):
        branch = DCN(4, 4, separable=separable, bound=1.5).conv_offset_mask
        for values in branch.parameters():
            nn.init.normal_(values, std=20)
        raw = branch(torch.randn(1, 4, 8, 8))
        assert raw[:, :18].abs().max() <= 1.5 < raw[:, 18:].abs().max()
        assert raw[:, :18].abs().max() > 1.4


def test_names_in_the_state_dict() -> None:
    article = list(DCN(4, 8).state_dict())
    assert list(DCN(4, 8, bound=3).state_dict()) == article
    names = [name for name in DCN(4, 8, separable=True).state_dict() if "offset" in name]
    assert names == [f"conv_offset_mask.{name}" for name in ("depthwise.weight", "pointwise.weight", "pointwise.bias")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offset_groups": 3}, "3 groups do not divide c1 = 8"),
        ({"offset_groups": True}, "True groups do not divide c1 = 8"),
        ({"d": 0}, "dilation 0 would read one place"),
        ({"d": (1, 0)}, "dilation"),
        ({"separable": 4}, "separable = 4: True or False"),
        ({"bound": -1}, "bound = -1: a number of pixels"),
        ({"bound": True}, "bound = True: a number of pixels"),
    ],
)
def test_what_makes_no_layer(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DCN(8, 8, **options)


def test_rows_take_the_options() -> None:
    block = C3DCN(8, 16, 2, True, 1, 0.5, 2, True, 3.0)
    assert all(isinstance(b.cv2.conv.conv_offset_mask, SeparableOffsets) for b in block.m)
    assert {(b.cv2.conv.offset_groups, b.cv2.conv.conv_offset_mask.bound) for b in block.m} == {(2, 3.0)}
    with pytest.raises(ValueError, match="groups of 16 channels do not divide 8"):
        GDCNConv(8, 8)


@torch.no_grad()
@each_option
def test_dcn_options_of_a_model_keep_what_plain_weights_know(options: dict, tmp_path: Path) -> None:
    """From plain weights to the same output; through a checkpoint; with a further --dcn; fused."""
    plain, x = fill(DetectionModel("yolov5n.yaml", nc=2)), image((1, 3, 64, 64))
    save_checkpoint(tmp_path / "plain.pt", plain.state_dict(), {"yaml": plain.yaml, "nc": 2})
    cfg = described(tmp_path, "dcn: [7, c3:6/3, c3:8]", yaml_of(options))
    model, report = build_or_load(cfg, tmp_path / "plain.pt", nc=2)
    model.detect.anchors.copy_(plain.detect.anchors)
    expected = plain(x)[0]
    assert (model.eval()(x)[0] - expected).abs().max() < 1e-4 * expected.abs().max()
    assert model.yaml["dcn"] == ["6.m.2.cv2", "7", "8.m.0.cv2"] and model.yaml["dcn_options"] == options
    assert report.transferred == len(plain.state_dict()) - 1  # the anchors

    save_checkpoint(tmp_path / "variant.pt", fill(model).state_dict(), {"yaml": model.yaml, "nc": 2})
    again = load_model(tmp_path / "variant.pt")
    expected = model(x)[0]
    assert (again.eval()(x)[0] - expected).abs().max() < 1e-4 * expected.abs().max()
    make_deformable(model, ["5"])
    kinds = {(m.offset_groups, type(m.conv_offset_mask)) for m in model.modules() if isinstance(m, DCN)}
    assert len(kinds) == 1
    expected = model(x)[0]
    assert (fuse(model)(x)[0] - expected).abs().max() < 1e-4 * expected.abs().max()


@each_option
def test_offsets_of_every_form_are_watched_shown_and_learn_slowly(options: dict, tmp_path: Path) -> None:
    model = DetectionModel(described(tmp_path, "dcn: 5", yaml_of(options)), nc=2)
    watch = DcnWatch(model)
    with watch.step():
        model(image((1, 3, 64, 64)))
    (statistics,) = watch.summary().values()
    assert statistics["mean_offset"] == 0 and statistics["mean_mask"] == 0.5
    assert [layer.name for layer in look(model.eval(), image((1, 3, 64, 64))).layers] == ["5.conv"]
    branch = model.model[5].conv.conv_offset_mask
    roles = parameter_roles(model)
    slow = {id(p) for role in ("dcn_offset_weight", "dcn_offset_bias") for p in roles[role]}
    assert {id(p) for p in branch.parameters()} == slow


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dcn_options: 4", r"mine\.yaml:\d+: dcn_options must be a mapping"),
        ("dcn_options: {groups: 4}", r"mine\.yaml:\d+: unknown dcn_options key 'groups'"),
        ("dcn_options: {offset_groups: 4.5}", r"mine\.yaml:\d+: dcn_options offset_groups: 4.5 is no whole number"),
        ("dcn_options: {offset_groups: 3}", r"mine\.yaml:\d+: dcn 5: dcn_options: .*3 groups do not divide"),
        ("dcn_options: {bound: -2}", r"mine\.yaml:\d+: dcn 5: dcn_options: bound = -2"),
    ],
)
def test_options_that_cannot_be_are_one_line_with_their_place(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        DetectionModel(described(tmp_path, "dcn: 5", line))


@pytest.mark.parametrize(
    ("request_", "paths"),
    [("c3:6/3", ["6.m.2.cv2"]), ("c3:6/2", ["6.m.0.cv2", "6.m.2.cv2"]), ("c3:6/9", ["6.m.2.cv2"])],
)
def test_every_kth_of_a_block_counts_from_its_last(request_: str, paths: list[str]) -> None:
    assert make_deformable(DetectionModel("yolov5n.yaml", nc=1), [request_]) == paths


def test_grouped_sampling_in_a_model(tmp_path: Path) -> None:
    text = (ROOT / "models" / "yolov5n.yaml").read_text().replace("9, C3, [512]", "9, C3GDCN, [512]")
    path = tmp_path / "grouped.yaml"
    path.write_text(text)
    model = DetectionModel(path, nc=2)
    block = model.model[6]
    assert isinstance(block, C3GDCN) and {b.cv2.dcn.offset_groups for b in block.m} == {4}
    sum(y.square().mean() for y in model(torch.rand(2, 3, 64, 64))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model = fill(model)
    save_checkpoint(tmp_path / "grouped.pt", model.state_dict(), {"yaml": model.yaml, "nc": 2})
    x = image((1, 3, 64, 64))
    with torch.no_grad():
        expected = model(x)[0]
        assert (load_model(tmp_path / "grouped.pt")(x)[0] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_plain_layers_are_what_they_were() -> None:
    assert type(DCN(4, 8).conv_offset_mask) is nn.Conv2d and type(DCNConv(4, 8).conv.conv_offset_mask) is nn.Conv2d


@pytest.mark.parametrize("kernel", [0, (3, 0)])
def test_a_kernel_without_taps_is_refused(kernel: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="kernel .*: 1 or more"):
        DCN(4, 4, kernel)
