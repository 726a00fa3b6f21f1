"""Building, transferring weights and loading for inference."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.ensemble import Ensemble
from models.loading import build_or_load, load_model
from models.yolo import DetectionModel
from tests.models.reference import fill, image
from utils.checkpoint import save_checkpoint
from utils.errors import CheckpointError, ConfigError
from utils.files import ROOT


def save(path: Path, model: DetectionModel, half: bool = False, **meta) -> Path:
    state = {k: v.half() if half and v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_checkpoint(path, state, {"yaml": model.yaml, "nc": model.nc, "names": model.names, **meta})
    return path


@pytest.fixture(scope="module")
def source() -> DetectionModel:
    model = fill(DetectionModel("yolov5n-dcn.yaml", nc=3))
    model.names = {0: "red", 1: "white", 2: "platelet"}
    with torch.no_grad():
        model.detect.anchors.mul_(1.5)  # as after AutoAnchor
    return model


@pytest.fixture(scope="module")
def weights(source: DetectionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("load") / "best.pt", source)


def test_from_yaml_alone() -> None:
    model, report = build_or_load("yolov5n.yaml", None, nc=2, names=["a", "b"])
    assert model.nc == 2 and model.names == {0: "a", 1: "b"} and model.training
    assert report.transferred == 0 and "random weights" in report.text()


def test_from_checkpoint_alone(source: DetectionModel, weights: Path) -> None:
    model, report = build_or_load(None, weights, nc=None)
    assert model.names == source.names and model.yaml == source.yaml
    assert report.transferred == report.total == len(source.state_dict())
    assert report.text() == f"Transferred {report.total}/{report.total} items from {weights}"
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_another_class_count_keeps_all_but_the_head(weights: Path) -> None:
    model, report = build_or_load(None, weights, nc=5)
    assert model.nc == 5 and model.names[4] == "4"
    assert report.total - report.transferred == 6 and len(report.mismatched) == 6 and not report.missing
    assert "Not transferred, other shape: model.24.m.0.weight (24, 64, 1, 1) -> (30, 64, 1, 1)" in report.text()


@pytest.mark.parametrize(("cfg", "anchors"), [("yolov5n-dcn.yaml", None), (None, 3.0), ("yolov5n-dcn.yaml", 3)])
def test_new_anchors_are_not_overwritten(weights: Path, cfg: str | None, anchors: float | None) -> None:
    model, report = build_or_load(cfg, weights, nc=3, anchors=anchors)
    assert report.missing == ["model.24.anchors"]
    first = [0.0, 1.0] if anchors else [10.0, 13.0]
    assert (model.detect.anchors[0, 0] * 8).tolist() == first


def test_other_architecture_takes_what_fits(weights: Path) -> None:
    """Plain yolov5n from the DCN checkpoint: everything but layers 1, 3, 5, which have other names."""
    model, report = build_or_load("yolov5n.yaml", weights, nc=3)
    assert report.missing[0] == "model.1.conv.weight" and report.transferred > 300
    assert "and" in report.text().splitlines()[-1]


def test_half_precision_files_load_as_float32(source: DetectionModel, tmp_path: Path) -> None:
    model, report = build_or_load(None, save(tmp_path / "half.pt", source, half=True), nc=3)
    assert model.model[0].conv.weight.dtype == torch.float32 and report.transferred == report.total


@torch.no_grad()
def test_load_model_is_ready_for_inference(source: DetectionModel, weights: Path) -> None:
    x = image((1, 3, 64, 64))
    fused, plain = load_model(weights), load_model(weights, "cpu", fuse=False)
    assert not fused.training and fused.names == source.names
    same_order = copy.deepcopy(source).eval().to(memory_format=torch.channels_last)  # other orders add up differently
    assert torch.equal(plain(x)[0], same_order(x)[0])
    assert torch.allclose(fused(x)[0], plain(x)[0], rtol=1e-3, atol=1e-2)
    assert torch.allclose(fused.detect.anchors, source.detect.anchors)


def test_a_checkpoint_brings_all_values_so_that_none_is_drawn(weights: Path) -> None:
    before = torch.get_rng_state()
    load_model(weights)
    assert torch.equal(torch.get_rng_state(), before)
    build_or_load(None, weights, nc=5)  # its head is new
    assert not torch.equal(torch.get_rng_state(), before)


def test_opening_a_checkpoint_imports_no_compiler(weights: Path) -> None:
    opens = "import sys; from models.loading import load_model; load_model(sys.argv[1]); print('sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", opens, weights], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


def test_several_files_make_an_ensemble(weights: Path, tmp_path: Path) -> None:
    both = load_model([weights, weights])
    assert isinstance(both, Ensemble) and len(both.models) == 2 and not both.training
    other = save(tmp_path / "other.pt", DetectionModel("yolov5n.yaml", nc=7))
    with pytest.raises(CheckpointError, match=r"same classes, these have \[3, 7\]"):
        load_model([weights, other])


def test_faults_are_one_line(source: DetectionModel, weights: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere.pt: no such file"):
        load_model("nowhere.pt")
    with pytest.raises(ConfigError, match="neither --weights nor --cfg"):
        build_or_load("", "", nc=None)
    with pytest.raises(CheckpointError, match="use --cfg yolov5n.yaml"):
        build_or_load(None, "yolov5n.yaml", nc=None)
    with pytest.raises(ConfigError, match="names: 2 class names for 3 classes"):
        build_or_load(None, weights, nc=None, names=["a", "b"])
    bare, part, alien = tmp_path / "bare.pt", tmp_path / "part.pt", tmp_path / "alien.pt"
    save_checkpoint(bare, source.state_dict(), {"nc": 3})
    with pytest.raises(CheckpointError, match="without a model description; add --cfg"):
        load_model(bare)
    few = {k: v for k, v in source.state_dict().items() if not k.startswith("model.23.")}
    save_checkpoint(part, few, {"yaml": source.yaml, "nc": 3})
    with pytest.raises(CheckpointError, match="do not fill its own model: model.23.cv1.conv.weight, .* more"):
        load_model(part)
    save_checkpoint(alien, {"backbone.weight": torch.ones(2)}, {"yaml": source.yaml, "nc": 3})
    with pytest.raises(CheckpointError, match="nothing in it fits"):
        build_or_load("yolov5n.yaml", alien, nc=3)


def test_bare_tensors_with_the_yaml_that_lists_their_dcn_layers(tmp_path: Path) -> None:
    text = (ROOT / "models" / "yolov5n.yaml").read_text() + "\ndcn: [c3:8]\ndcn_options: {offset_groups: 2}\n"
    (tmp_path / "mine.yaml").write_text(text)
    model = fill(DetectionModel(tmp_path / "mine.yaml", nc=3)).eval()
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    loaded = load_model(tmp_path / "bare.pt", cfg=tmp_path / "mine.yaml", fuse=False)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert "model.8.m.0.cv2.conv.conv_offset_mask.weight" in loaded.state_dict()
