"""Model YAMLs: each fault is one line with file and line number; nothing in a file is run."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from models.yolo import DetectionModel
from tests.models.reference import stored
from utils.errors import ConfigError
from utils.files import ROOT, load_yaml

GOOD = """nc: 3
depth_multiple: 1.0
width_multiple: 1.0
anchors:
  - [10,13, 16,30]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 3, C3, [16]]
head:
  - [-1, 1, Conv, [8, 3, 2]]
  - [[-1], 1, Detect, [nc, anchors]]
"""
ROW = "  - [-1, 3, C3, [16]]"
HEAD = "  - [[-1], 1, Detect, [nc, anchors]]"
TOP = "backbone:\n  - [-1, 1, Conv, [8, 3, 2]]\n" + ROW


def build(tmp_path: Path, text: str) -> DetectionModel:
    path = tmp_path / "m.yaml"
    path.write_text(text)
    return DetectionModel(path)


def test_the_good_one_builds(tmp_path: Path) -> None:
    model = build(tmp_path, GOOD)
    assert model.stride.tolist() == [4] and len(model.model[1].m) == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (ROW, "  - [-1, 3, DNC, [16]]", r"m.yaml:8: unknown block 'DNC', did you mean 'DCN'\?"),
        (ROW, "  - [-1, 1, nn.Linear, [16]]", "m.yaml:8: unknown block 'nn.Linear'"),
        (ROW, "  - [-1, 1, os.system, ['true']]", "m.yaml:8: unknown block 'os.system'"),
        (ROW, "  - [-1, 1, Conv, ['16']]", "m.yaml:8: Conv: the first argument is the channels out"),
        (ROW, "  - [-1, 1, Conv, []]", "m.yaml:8: Conv: the first argument is the channels out.* got nothing"),
        (ROW, "  - [-1, 1, Conv, [-4]]", "m.yaml:8: Conv: the first argument"),
        (ROW, "  - [-1, 1, Conv, [16, 3, 1, None, 1, 1, True, 9]]", r"m.yaml:8: Conv: 9 arguments .*fit \(c1, c2, k=1"),
        (ROW, "  - [-1, 1, Conv, [16, three]]", "m.yaml:8: Conv: k = 'three' is text"),
        (ROW, "  - [-1, 1, Conv, [16, 3.5]]", "m.yaml:8: Conv: "),
        (ROW, "  - [-1, 1, Conv, [16, 3, 1, None, 5]]", "m.yaml:8: Conv: .*divisible by groups"),
        (ROW, "  - [-1, 1, Conv, [16, 999, 1, 0]]", "m.yaml:8: layer 1 does not fit its input .*8, 128, 128"),
        (ROW, "  - [-1, 1, TransformerBlock, [16, 3, 1]]", "m.yaml:8: TransformerBlock: embed_dim must be divisible"),
        (ROW, "  - [5, 1, C3, [16]]", "m.yaml:8: 'from' 5 of layer 1 points nowhere: layers 0..0 come before it"),
        (ROW, "  - [1, 1, C3, [16]]", "m.yaml:8: 'from' 1 of layer 1 points nowhere"),
        (ROW, "  - [-2, 1, C3, [16]]", "m.yaml:8: 'from' -2 of layer 1 points nowhere"),
        (ROW, "  - [x, 1, C3, [16]]", "m.yaml:8: 'from' must be a layer number"),
        (ROW, "  - [[-1, 0], 1, C3, [16]]", "m.yaml:8: C3: 'from' must be one layer number"),
        (ROW, "  - [-1, 1, Concat, [1]]", "m.yaml:8: Concat: 'from' must be a list of layer numbers"),
        (ROW, "  - [-1, 0, C3, [16]]", "m.yaml:8: 'number' must be a whole number"),
        (ROW, "  - [-1, many, C3, [16]]", "m.yaml:8: 'number' must be a whole number"),
        (ROW, "  - [-1, 1, C3, 16]", "m.yaml:8: the arguments of C3 must be a list"),
        (ROW, "  - [-1, 1, C3]", "m.yaml:8: expected a row"),
        (ROW, "  - [-1, 1, 7, [16]]", "m.yaml:8: the module must be a name"),
        (ROW, "  - [-1, 1, Expand, [3]]", "m.yaml:8: Expand: 8 channels do not divide by 3 squared"),
        (ROW, "  - [-1, 1, Detect, [nc, anchors]]", "m.yaml:8: Detect must be the last row"),
        (HEAD, "  - [-1, 1, Conv, [8]]", "m.yaml:11: Detect must be the last row"),
        (HEAD, "  - [[0, -1], 1, Detect, [nc, anchors]]", "Detect: anchors for 1 levels but 2 inputs"),
        (HEAD, "  - [[-1], 2, Detect, [nc, anchors]]", "m.yaml:11: Detect: the number must be 1, got 2"),
        (HEAD, "  - [[-1], 1, Detect, [-1, anchors]]", r"m.yaml:11: Detect: takes \[nc, anchors\]"),
        (ROW, "  - [-1, 1, Conv, [16, 3, 0]]", "m.yaml:8: "),
        (HEAD, "  - [[-1], 1, Detect, [nc]]", r"m.yaml:11: Detect: takes \[nc, anchors\]"),
        ("nc: 3\n", "", "m.yaml: missing nc; a model needs"),
        ("nc: 3", "nc: 0", "m.yaml:1: nc must be a whole number from 1 up, got 0"),
        ("nc: 3", "nc: true", "m.yaml:1: nc must be"),
        ("nc: 3", "nc: 3\nactivaton: nn.ReLU()", "m.yaml:2: unknown key 'activaton', did you mean 'activation'"),
        ("nc: 3", "nc: 3\nactivation: nn.Nope()", "m.yaml:2: activation 'nn.Nope"),
        ("depth_multiple: 1.0", "depth_multiple: -1", "m.yaml:2: depth_multiple must be a number above 0"),
        ("depth_multiple: 1.0", "depth_multiple: 1e9", "m.yaml:2: depth_multiple must be|m.yaml:8: C3: .* repeats"),
        ("width_multiple: 1.0", "width_multiple: wide", "m.yaml:3: width_multiple must be"),
        ("  - [10,13, 16,30]", "  - [10,13, 16]", "m.yaml:5: anchors must be lists w,h"),
        ("  - [10,13, 16,30]", "  - [10,13, a,30]", "m.yaml:5: anchor sides must be numbers"),
        ("  - [10,13, 16,30]", "  - [10,13]\n  - [10,13, 16,30]", "m.yaml:6: 2 anchors here, 1 in the first level"),
        (TOP, "backbone: []", "m.yaml:6: backbone must be a list of rows"),
    ],
)  # fmt: skip
def test_fault_is_one_line_with_its_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=message) as caught:
        build(tmp_path, GOOD.replace(old, new))
    assert "\n" not in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml: no such model YAML"):
        DetectionModel("nowhere.yaml")


def test_dict_description_names_the_row() -> None:
    description = copy.deepcopy(dict(load_yaml(ROOT / "models/yolov5n.yaml")))
    description["head"][2][2] = "Concta"
    with pytest.raises(
        ConfigError, match="model description, head row 3: unknown block 'Concta', did you mean 'Concat'"
    ):
        DetectionModel(description)


def test_sequence_of_copies(tmp_path: Path) -> None:
    """Blocks without a repeat argument are built n times; a copy starts from the channels of the first."""
    model = build(tmp_path, GOOD.replace(ROW, "  - [-1, 3, Bottleneck, [16]]"))
    assert isinstance(model.model[1], nn.Sequential) and model.model[1].type == "models.common.Bottleneck"
    assert [b.add for b in model.model[1]] == [False, True, True]


def test_repeats_round_half_to_even(tmp_path: Path) -> None:
    text = GOOD.replace("depth_multiple: 1.0", "depth_multiple: 0.5")
    assert len(build(tmp_path, text.replace(ROW, "  - [-1, 5, C3, [16]]")).model[1].m) == 2
    assert len(build(tmp_path, text.replace(ROW, "  - [-1, 1, C3, [16]]")).model[1].m) == 1


def test_width_rounds_up_to_eight_except_for_head_sized_layers(tmp_path: Path) -> None:
    text = GOOD.replace("width_multiple: 1.0", "width_multiple: 0.3")
    head_sized = 2 * (3 + 5)
    for written, built in ((20, 8), (30, 16), (head_sized, head_sized)):
        assert build(tmp_path, text.replace("[16]", f"[{written}]")).model[1].cv3.conv.out_channels == built


def test_channel_rules_of_the_other_blocks(tmp_path: Path) -> None:
    rows = "\n".join(
        f"  - {row}"
        for row in (
            "[-1, 1, Contract, [2]]",
            "[-1, 1, Expand, [2]]",
            "[-1, 1, nn.BatchNorm2d, []]",
            "[-1, 1, nn.ConvTranspose2d, [16, 2, 2]]",
            "[-1, 1, Conv, [8, 1, 1, None, 1, 1, nn.ReLU()]]",
            "[[-1, 0], 1, Concat, [1]]",
        )
    )
    with pytest.raises(ConfigError, match="layer 6 does not fit its input .*8, 256, 256.*8, 128, 128"):
        build(tmp_path, GOOD.replace(ROW, rows))
    model = build(tmp_path, GOOD.replace(ROW, rows.replace("[16, 2, 2]", "[16, 1, 1]")))
    assert model.model[3].num_features == 8 and model.model[3].eps == 1e-3
    assert isinstance(model.model[5].act, nn.ReLU)
    assert model.model[7].conv.in_channels == 16


def test_anchors_as_a_number_are_placeholders(tmp_path: Path) -> None:
    model = build(tmp_path, GOOD.replace("anchors:\n  - [10,13, 16,30]", "anchors: 3"))
    assert (model.detect.anchors * 4).flatten().tolist() == [0, 1, 2, 3, 4, 5]


COUNTED = stored("models_summary.json")  # these are built in test_summary.py
OTHERS = [p for p in sorted((ROOT / "models").rglob("*.yaml")) if p.name != "anchors.yaml" and p.stem not in COUNTED]


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_every_other_yaml_builds(path: Path) -> None:
    with torch.device("meta"):
        model = DetectionModel(path.name)
    assert model.nc == 80 and model.detect.nl == 3


def test_dcn_yamls_are_the_plain_ones_with_dcn_rows() -> None:
    for size in "nsmlx":
        plain = load_yaml(ROOT / f"models/yolov5{size}.yaml")
        for suffix, rows in (("dcn", (1, 3, 5)), ("dcn4", (1, 3, 5, 7))):
            deformed = dict(load_yaml(ROOT / f"models/yolov5{size}-{suffix}.yaml"))
            for row in rows:
                assert deformed["backbone"][row][2] == "DCN"
                deformed["backbone"][row][2] = "Conv"
            assert deformed == dict(plain)
        best = dict(load_yaml(ROOT / f"models/yolov5{size}-dcn-best.yaml"))
        assert best.pop("dcn") == ["7"] and best == dict(plain)


def test_hub_anchor_sets_have_growing_levels() -> None:
    sets = load_yaml(ROOT / "models/hub/anchors.yaml")
    assert len(sets) == 7
    for levels in sets.values():
        areas = [sum(w * h for w, h in zip(level[::2], level[1::2])) for level in levels]
        assert areas == sorted(areas)
