"""Counts equal to upstream's for every published model; the table; the command line."""

from __future__ import annotations

import pytest
import torch

from models.common import DCN
from models.summary import count_flops, summarize
from models.surgery import fuse
from models.yolo import DetectionModel, main
from tests.models.reference import stored
from utils.errors import ConfigError

MODELS = stored("models_summary.json")


def on_meta(name: str, **kwargs) -> DetectionModel:
    """A model without memory: shapes are all that counting needs."""
    with torch.device("meta"):
        return DetectionModel(name, **kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_counts_equal_reference(name: str) -> None:
    expected, model = MODELS[name], on_meta(f"{name}.yaml")
    found = summarize(model)
    assert (found.params, found.layers, found.gradients) == (
        expected["params"],
        expected["modules_leaf"],
        expected["params"],
    )
    assert found.gflops == pytest.approx(expected["gflops_640_strideprofile"], rel=1e-4)
    assert len(model.state_dict()) == expected["state_dict_keys"] and model.save == expected["save"]
    rows = [[r.index, r.source, r.type.removeprefix("torch.nn.modules."), r.params] for r in found.rows]
    short = [[i, f, kind.rpartition(".")[2] if kind.startswith("models.") else kind, n] for i, f, kind, n in rows]
    assert short == expected["layers"]
    fused = summarize(fuse(model))
    assert (fused.params, fused.layers, fused.gradients) == (
        expected["fused"]["params"],
        expected["fused"]["modules_leaf"],
        0,
    )
    assert fused.gflops == pytest.approx(expected["fused"]["gflops_640_strideprofile"], rel=1e-4)
    assert len(model.state_dict()) == expected["fused"]["state_dict_keys"]


def test_dcn_is_counted() -> None:
    """Matrix product + offset convolution + 4 multiply-adds per sample, twice."""
    model = on_meta("yolov5n-dcn.yaml")
    layer = model.model[1]
    assert isinstance(layer, DCN)
    pixels, c_in, c_out = 64 * 64, 16, 32
    macs = pixels * c_in * 9 * (c_out + 27 + 4)
    assert count_flops(model)[1] == 2 * macs


def test_text_has_a_row_per_layer_and_the_totals() -> None:
    text = summarize(on_meta("yolov5n.yaml")).text()
    assert text.endswith("YOLOv5n summary: 125 layers, 1,872,157 parameters, 1,872,157 gradients, 4.6 GFLOPs")
    rows = text.splitlines()
    assert "from" in rows[1] and "arguments" in rows[1]
    assert rows[2].split()[:5] == ["0", "-1", "1", "1760", "models.common.Conv"] and rows[2].rstrip().endswith(
        "[3, 16, 6, 2, 2]"
    )
    assert len(rows) == 2 + 25 + 2


def test_counting_leaves_the_model_as_it_was() -> None:
    model = DetectionModel("yolov5n.yaml", nc=1)
    model.model[0].bn.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    summarize(model, 64, profile=True)
    assert model.training and not model.model[0].bn.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_size_scales_the_operations() -> None:
    model = on_meta("yolov5n.yaml")
    assert summarize(model, 320).gflops == pytest.approx(summarize(model, 640).gflops / 4)


def test_command_line(capsys: pytest.CaptureFixture) -> None:
    main(["--cfg", "yolov5n-dcn.yaml", "--imgsz", "64", "--profile", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "models.common.DCN" in out and "ms for all layers" in out and "GFLOPs" in out
    with pytest.raises(ConfigError, match="--imgsz 0"):
        main(["--imgsz", "0"])
