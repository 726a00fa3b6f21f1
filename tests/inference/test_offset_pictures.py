"""--show-offsets: the pictures, and who gets none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import detect
from engine.offset_pictures import GAP, PANEL, TITLE, offset_picture, to_image, to_network
from models.sampling import look
from models.yolo import DetectionModel
from tests.inference.conftest import picture, write_png
from utils.augmentations import Letterbox
from utils.checkpoint import save_checkpoint
from utils.errors import ConfigError
from utils.images import read_image


def dcn_model() -> DetectionModel:
    torch.manual_seed(0)
    return DetectionModel("yolov5n-dcn.yaml", nc=2).eval().requires_grad_(False)


def test_rows_of_panels() -> None:
    model = dcn_model()
    for layer in (1, 3, 5):
        model.model[layer].conv_offset_mask.bias[:18] = 1.5  # away from the crosses
    sampling = look(model, torch.rand(1, 3, 96, 128))
    rows = torch.tensor([[10.0, 20, 60, 40, 0.9, 1], [70, 5, 120, 90, 0.8, 0], *[[0.0, 0, 9, 9, 0.5, 0]] * 5])
    image = offset_picture(picture(), rows, {0: "red", 1: "b\u00e9b\u00e9"}, sampling, Letterbox((96, 128)))
    assert image.dtype == np.uint8
    assert image.shape == (3 * (PANEL + TITLE), 5 * PANEL + 4 * GAP, 3)  # three objects; three layers and two more
    first = image[TITLE : TITLE + PANEL, :PANEL]
    assert (first == (80, 255, 80)).all(2).any() and (first == 255).all(2).any()  # the object's box, the crosses
    assert offset_picture(picture(), rows[:0], {}, sampling, Letterbox((96, 128))) is None


def test_offsets_that_are_lost_do_not_stop_it() -> None:
    model = dcn_model()
    for layer, value in ((model.model[3], float("nan")), (model.model[5], 1e30)):
        layer.conv_offset_mask.bias[:9] = value
    image = offset_picture(
        picture(),
        torch.tensor([[10.0, 20, 60, 40, 0.9, 1]]),
        {},
        look(model, torch.rand(1, 3, 96, 128)),
        Letterbox((96, 128)),
    )
    assert image.shape[0] == PANEL + TITLE


def test_the_letterbox_and_back() -> None:
    letterbox = Letterbox((100, 200), ratio=(0.64, 0.64), pad=(0.0, 128.0))
    places = torch.tensor([[0.0, 0.0], [50.0, 100.0]])
    assert to_network(places, letterbox).tolist() == [[128.0, 0.0], [160.0, 64.0]]
    assert torch.allclose(to_image(to_network(places, letterbox), letterbox), places, atol=1e-4)


def test_from_the_command_line(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    model = dcn_model()
    meta = {"yaml": model.yaml, "nc": 2, "names": {0: "red", 1: "green"}}
    save_checkpoint(tmp_path / "dcn.pt", model.state_dict(), meta)
    for number in range(2):
        write_png(tmp_path / "in" / f"{number}.png", seed=number)
    flags = ["--source", str(tmp_path / "in"), "--img", "128", "--device", "cpu", "--conf", "0.00001", "--nosave"]
    flags += ["--project", str(tmp_path / "runs"), "--show-offsets"]
    assert detect.main(["--weights", str(tmp_path / "dcn.pt"), *flags]) == 0
    folder = tmp_path / "runs" / "exp" / "offsets"
    assert [file.name for file in sorted(folder.iterdir())] == ["0.jpg", "1.jpg"]
    assert read_image(folder / "0.jpg").shape == (3 * (PANEL + TITLE), 5 * PANEL + 4 * GAP, 3)
    assert detect.main(["--weights", str(tmp_path / "dcn.pt"), *flags, "--conf", "1", "--name", "none"]) == 0
    assert "nothing was detected" in capsys.readouterr().out and not (tmp_path / "runs" / "none" / "offsets").exists()
    with pytest.raises(ConfigError, match="this model has no DCN layer"):
        detect.main(["--weights", str(checkpoint), *flags])
    assert not (tmp_path / "runs" / "exp2").exists()
    with pytest.raises(ConfigError, match="--show-offsets: works on checkpoints"):
        detect.main(["--weights", "x.onnx", *flags])
