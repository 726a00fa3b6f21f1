"""--dcn: plain convolutions made deformable, with the output they had."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from engine.parts import build_model
from models.common import DCN, Conv, DCNConv, DWConv
from models.deform import make_deformable, parse_requests
from models.loading import build_or_load, load_model
from models.surgery import fuse
from models.yolo import DetectionModel
from models.yolo import main as show
from tests.models.reference import fill, image
from utils.checkpoint import read_checkpoint, save_checkpoint
from utils.config import DataConfig, Hyp, TrainConfig
from utils.errors import ConfigError
from utils.files import ROOT
from utils.optim import parameter_roles


@dataclass(frozen=True)
class _Layer:
    type: str = "models.common.Conv"


def converted(name: str, text: str) -> DetectionModel:
    model = fill(DetectionModel(name, nc=2))
    make_deformable(model, parse_requests(text))
    return model


def deformable(model: nn.Module) -> list[str]:
    return [path.removesuffix(".conv") for path, module in model.model.named_modules() if isinstance(module, DCN)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("yolov5n.yaml", "1,3,5"),
        ("yolov5n.yaml", "0, c3:8"),
        ("yolov5n.yaml", "all3x3"),
        ("yolov5s-LeakyReLU.yaml", "backbone.last2"),
        ("yolov5s-ghost.yaml", "all3x3"),
        ("yolov5n-dcn.yaml", "7,c3:6"),
        ("yolov3-tiny.yaml", "0,2,13"),
    ],
)
def test_the_models_output_stays(name: str, text: str) -> None:
    plain, x = fill(DetectionModel(name, nc=2)).double(), image((1, 3, 64, 64)).double()
    expected, _ = plain(x)
    model = converted(name, text)
    assert len(deformable(model)) > len(deformable(plain))
    decoded, _ = model.double()(x)
    assert torch.allclose(decoded, expected, rtol=1e-12, atol=1e-12)
    scale = expected.abs().amax((0, 1))  # of each of x, y, w, h, objectness, classes

    def error(of: DetectionModel) -> float:
        return ((of(x.float())[0] - expected).abs().amax((0, 1)) / scale).max().item()

    own = error(plain.float())  # what float32 costs the plain model
    assert error(model.float()) < 2 * own + 1e-6 and error(fuse(model)) < 3 * own + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "block",
    [
        Conv(8, 16, 3, 2),
        Conv(8, 12, 6, 2, 2),
        Conv(8, 8, 3, 1, g=4),
        DWConv(8, 16, 5),
        Conv(4, 6, (1, 3)),
        Conv(3, 5, 3, d=2),
    ],
    ids=["3x3 s2", "6x6", "groups", "depthwise", "1x3", "dilated"],
)
def test_bit_for_bit_the_operator_with_the_convolutions_weight(block: Conv, dtype: torch.dtype) -> None:
    """Weight x 2 with mask sigmoid(0) = 1/2 gives the very floats of weight x 1 with mask 1, and 1e-5 (1e-13) of
    F.conv2d, which adds in another order."""
    model = nn.Module()
    model.model, model.yaml, model.layers = nn.Sequential(fill(block).to(dtype)), {}, [_Layer()]
    conv = block.conv
    x = image((2, conv.in_channels, 15, 17)).to(dtype) - 0.3
    plain, expected = conv(x), block(x)
    assert make_deformable(model, ["0"]) == ["0"]
    made = model.model[0]
    taps = conv.weight[0, 0].numel()
    offset, mask = (torch.zeros(2, n * taps, *plain.shape[2:], dtype=dtype) for n in (2, 1))
    same = torchvision.ops.deform_conv2d(
        x, offset, conv.weight, None, conv.stride, conv.padding, conv.dilation, mask + 1
    )
    assert isinstance(made, DCNConv) and made.bn is block.bn and made.act is block.act
    assert torch.equal(made.conv(x), same)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert torch.allclose(made.conv(x), plain, rtol=tolerance, atol=tolerance)
    assert torch.allclose(made(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("1,3,5", ["1", "3", "5"]),
        ("5,1,1", ["1", "5"]),
        ("backbone.last2", ["5", "7"]),
        ("c3:8", ["8.m.0.cv2"]),
        ("C3:6, 1", ["1", "6.m.0.cv2", "6.m.1.cv2", "6.m.2.cv2"]),
        ("8.m.0.cv2", ["8.m.0.cv2"]),
    ],
)
def test_what_a_request_means(text: str, paths: list[str]) -> None:
    model = converted("yolov5n.yaml", text)
    assert model.yaml["dcn"] == paths == deformable(model)


def test_all3x3_leaves_1x1_and_the_stem() -> None:
    paths = converted("yolov5n.yaml", "all3x3").yaml["dcn"]
    assert len(paths) == 17 and "0" not in paths and not any(path.endswith("cv1") for path in paths)


def test_a_repeated_row_is_converted_whole() -> None:
    rows = {
        "backbone": [[-1, 2, "Conv", [8, 3]], [-1, 1, "Conv", [8, 3, 2]]],
        "head": [[[1], 1, "Detect", ["nc", "anchors"]]],
    }
    model = DetectionModel({"nc": 1, "depth_multiple": 1, "width_multiple": 1, "anchors": 3, **rows})
    assert make_deformable(model, ["0"]) == ["0.0", "0.1"]
    assert model.layers[0].type == "models.common.Conv, 2 now DCN"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("yolov5n.yaml", "25", r"--dcn 25: the model has layers 0\.\.24"),
        ("yolov5n.yaml", "c3:99", r"the model has layers 0\.\.24"),
        ("yolov5n.yaml", "10", "--dcn 10: it is a 1x1 convolution"),
        ("yolov5n.yaml", "8", "--dcn 8: it is a C3, not a Conv; c3:8 takes the 3x3"),
        ("yolov5n.yaml", "24", "--dcn 24: it is a Detect, not a Conv$"),
        ("yolov5n.yaml", "c3:9", r"layer 9 \(SPPF\) has no 3x3"),
        ("yolov5n.yaml", "c3:1", "layer 1 is a single Conv; write 1"),
        ("yolov5n.yaml", "one", "--dcn 'one': not understood; give a layer number"),
        ("yolov5n.yaml", "-1", "not understood"),
        ("yolov5n.yaml", "9" * 5000, "not understood"),
        ("yolov5n.yaml", "c3:6/" + "9" * 5000, "not understood"),
        ("yolov5n.yaml", "8.m.7.cv2", "the model has no such part"),
        ("yolov5n.yaml", "backbone.last0", "the backbone has 5 Conv layers larger than 1x1"),
        ("yolov5n-dcn.yaml", "1", "--dcn 1: it is a DCN already"),
        ("yolov5s-dcnconv.yaml", "1", "--dcn 1: it is a DCNConv already"),
        ("yolov5s-c3dcn.yaml", "c3:8", r"the 3x3 convolutions of layer 8 \(C3DCN\) are DCN already"),
    ],
)
def test_refusals_are_one_line_and_change_nothing(name: str, text: str, message: str) -> None:
    model = DetectionModel(name, nc=1)
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match=message) as caught:
        make_deformable(model, ["7", *parse_requests(text)])
    assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == before and "dcn" not in model.yaml


def test_twice_and_fused_are_refused() -> None:
    model = converted("yolov5n.yaml", "all3x3")
    for again in ("1", "all3x3", "c3:8"):
        with pytest.raises(ConfigError, match="already|not DCN yet"):
            make_deformable(model, [again])
    with pytest.raises(ConfigError, match="folded into the convolution.*fuse=False"):
        make_deformable(fuse(DetectionModel("yolov5n.yaml", nc=1)), ["1"])


@torch.no_grad()
def test_a_checkpoint_rebuilds_it(tmp_path: Path) -> None:
    model = converted("yolov5n.yaml", "3,c3:8")
    path = tmp_path / "dcn.pt"
    save_checkpoint(path, model.state_dict(), {"yaml": model.yaml, "nc": 2})
    loaded, x = load_model(path, fuse=False), image((1, 3, 64, 64))
    assert deformable(loaded) == deformable(model) == ["3", "8.m.0.cv2"]
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.allclose(loaded(x)[0], model(x)[0], rtol=1e-3, atol=1e-3)  # another memory format
    more, report = build_or_load(None, path, nc=3)
    make_deformable(more, ["5"])
    assert more.yaml["dcn"] == ["3", "8.m.0.cv2", "5"] and report.transferred == report.total - 6  # all but the head
    assert deformable(DetectionModel(more.yaml)) == ["3", "5", "8.m.0.cv2"]


def test_a_model_yaml_may_ask_for_it(tmp_path: Path) -> None:
    text = (ROOT / "models" / "yolov5n.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(f"{text}\ndcn: [3, c3:8]\n")
    assert deformable(DetectionModel(path, nc=1)) == ["3", "8.m.0.cv2"]
    path.write_text(f"{text}\ndcn: 77\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:\d+: dcn 77: the model has layers"):
        DetectionModel(path)
    path.write_text(f"{text}\ndcn: [1.5]\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:\d+: dcn must list layers"):
        DetectionModel(path)


def test_the_offset_branch_has_its_own_learning_rate_and_frozen_stays_frozen() -> None:
    model = DetectionModel("yolov5n.yaml", nc=1)
    model.model[3].requires_grad_(False)
    make_deformable(model, ["1", "3"])
    assert [len(parameter_roles(model)[f"dcn_offset_{kind}"]) for kind in ("weight", "bias")] == [2, 2]
    assert model.model[1].conv.conv_offset_mask.weight.requires_grad and not model.model[3].conv.weight.requires_grad


def test_offsets_that_freeze_keeps_at_zero_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """Where a YAML, not --dcn, made the layer deformable."""
    data = DataConfig.load(ROOT / "data" / "bccd.yaml")
    for frozen, told in ((8, True), (7, False)):
        caplog.clear()
        cfg = TrainConfig(cfg="yolov5n-dcn-best.yaml", weights="", freeze=(frozen,))
        build_model(cfg, Hyp(), data, torch.device("cpu"))
        assert any("--freeze: the offsets of 7.conv are zero" in line for line in caplog.messages) == told


def test_the_table_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    show(["--cfg", "yolov5n.yaml", "--dcn", "1,c3:8", "--imgsz", "64", "--device", "cpu"])
    table = capsys.readouterr().out
    assert table.count("models.common.DCNConv ") == 1 and "models.common.C3, 1 now DCN" in table
    model = converted("yolov5n.yaml", "1,c3:8")
    save_checkpoint(tmp_path / "dcn.pt", model.state_dict(), {"yaml": model.yaml})
    show(["--cfg", str(tmp_path / "dcn.pt"), "--imgsz", "64", "--device", "cpu"])
    rows, again = ([row for row in text.splitlines() if " models." in row] for text in (table, capsys.readouterr().out))
    assert rows[:-1] == again[:-1] and len(rows) > 20  # the heads differ in classes


@torch.no_grad()
def test_the_bundled_checkpoint_gains_dcn_without_losing_what_it_knows() -> None:
    start = ROOT / "data" / "demo" / "yolov5n-dcn-start.pt"
    nc = read_checkpoint(start).meta["nc"]
    plain, _ = build_or_load(None, start, nc)
    model, _ = build_or_load(None, start, nc)
    make_deformable(model, ["7", "c3:8", "c3:6"])
    x = image((1, 3, 96, 96))
    expected, found = plain.eval()(x)[0], model.eval()(x)[0]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_plain_weights_in_a_model_with_dcnconv_give_the_plain_output(tmp_path: Path) -> None:
    """And back: a model YAML with DCNConv or C3DCN rows starts from a plain checkpoint as --dcn does."""
    x = image((1, 3, 64, 64))
    pairs = [("yolov5s.yaml", "hub/yolov5s-dcnconv.yaml"), ("yolov5s.yaml", "hub/yolov5s-c3dcn.yaml")]
    for start, goal in pairs + [pair[::-1] for pair in pairs]:
        model = fill(DetectionModel(start, nc=2))
        for module in model.modules():
            if isinstance(module, DCN):  # as it is at its start
                module.conv_offset_mask.requires_grad_(False).weight.zero_()
                module.conv_offset_mask.bias.zero_()
                module.bias.zero_()
        save_checkpoint(tmp_path / "start.pt", model.state_dict(), {"yaml": model.yaml, "nc": 2})
        other, _ = build_or_load(goal, tmp_path / "start.pt", nc=2)
        other.detect.anchors.copy_(model.detect.anchors)
        expected, found = model(x)[0], other.eval()(x)[0]
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
