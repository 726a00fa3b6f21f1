"""The Python way in: what a Detector accepts and what its Results offer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import utils.device
from models.api import Detector
from models.loading import load_model
from models.results import Results
from tests.inference.conftest import BOXES, NAMES, FakeModel, picture, write_png
from utils.boxes import box_iou
from utils.errors import CheckpointError, ConfigError, DataError, SourceError
from utils.files import ROOT
from utils.images import read_image

XYXY = [[28, 22, 68, 42, 0.9, 1], [84, 46, 96, 54, 0.75, 1], [15, 15, 25, 25, 0.5, 0]]


@pytest.fixture
def results(detector: Detector) -> Results:
    return detector([picture(seed=1), picture(seed=2)], size=128)


def test_every_kind_of_image_gives_the_same_boxes(detector: Detector, tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png")
    kinds = [
        path,
        str(path),
        Image.open(path),
        picture(),
        np.dstack([picture(), picture()[:, :, :1]]),
        picture()[:, :, 0],
    ]
    for image in kinds:
        found = detector(image, size=128)
        assert len(found) == 1 and np.allclose(found.xyxy[0], XYXY) and found.ims[0].shape == (96, 128, 3)
    assert detector(kinds, size=128).files == ["a.png", "a.png", "a.png", "image3.jpg", "image4.jpg", "image5.jpg"]


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("https://example.invalid/a.jpg", SourceError, "nothing is downloaded"),
        ("no/such.jpg", SourceError, "no such picture"),
        (picture().astype(np.float32), SourceError, "expected uint8.*got float32"),
        (picture().transpose(2, 0, 1), SourceError, r"got uint8 \(3, 96, 128\)"),
        (np.zeros((0, 4, 3), np.uint8), SourceError, "expected uint8"),
        (7, SourceError, "got int"),
        ([], SourceError, "list is empty"),
    ],
)
def test_what_is_no_image_is_said(detector: Detector, image: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        detector(image)


def test_a_file_that_is_no_picture(detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"text")
    with pytest.raises(DataError, match="a.jpg"):
        detector(tmp_path / "a.jpg")


def test_a_tensor_gives_decoded_predictions(detector: Detector) -> None:
    decoded = detector(torch.rand(2, 3, 96, 128))
    assert decoded.shape == (2, 3, 8) and decoded.dtype == torch.float32


def test_images_of_different_shapes_share_one_batch(tmp_path: Path) -> None:
    model = FakeModel(BOXES[:1])
    found = Detector(model, torch.device("cpu"))([picture(96, 128), picture(128, 64)], size=128)
    assert model.seen == [(2, 3, 128, 128)]
    # The first image is padded by 16 rows above, the second by 32 columns on the left.
    assert found.xyxy[0][0, :4].tolist() == [28, 6, 68, 26] and found.xyxy[1][0, :4].tolist() == [0, 22, 36, 42]


def test_settings_are_attributes(detector: Detector) -> None:
    assert (detector.conf, detector.iou, detector.max_det, detector.classes) == (0.25, 0.45, 1000, None)
    detector.conf = 0.6
    assert len(detector(picture(), size=128).pred[0]) == 2
    detector.classes = [0]
    assert len(detector(picture(), size=128).pred[0]) == 0
    detector.classes, detector.max_det = None, 1
    assert len(detector(picture(), size=128).pred[0]) == 1
    detector.conf = 7
    with pytest.raises(ConfigError, match="conf"):
        detector(picture())


def test_unknown_settings_and_sizes(detector: Detector) -> None:
    with pytest.raises(ConfigError, match="config: no such setting, did you mean 'conf'"):
        Detector(FakeModel([]), torch.device("cpu"), config=0.3)
    assert detector.round_size(100) == (128, 128) and detector.round_size([64, 65]) == (64, 96)
    for size in (0, (1, 2, 3), []):
        with pytest.raises(ConfigError, match="--imgsz"):
            detector.round_size(size)


def test_a_file_of_one_size_is_not_augmented() -> None:
    model = FakeModel([])
    model.imgsz = (96, 128)
    with pytest.raises(ConfigError, match="--augment: .* this file takes one"):
        Detector(model, torch.device("cpu"), augment=True)


DEMO = ROOT / "data" / "demo" / "yolov5n-dcn-start.pt"


@pytest.mark.parametrize(
    ("exported", "has", "why"),
    [(True, True, "an exported file keeps its own precision"), (False, False, "no fast half precision on this cpu")],
)
def test_half_that_cannot_be_is_one_warning(exported: bool, has: bool, why: str, log, monkeypatch) -> None:
    monkeypatch.setattr(utils.device, "cpu_has_bfloat16", lambda: has)
    model = FakeModel([]) if exported else load_model(DEMO)
    detector = Detector(model, torch.device("cpu"), half=True)
    assert detector.dtype == torch.float32 and log.text.count(f"--half: {why}; running in float32") == 1


def test_half_on_a_cpu_that_has_bfloat16(log, monkeypatch) -> None:
    """The same objects; the anchors, which bfloat16 would round, stay as they are."""
    monkeypatch.setattr(utils.device, "cpu_has_bfloat16", lambda: True)
    file = next((ROOT / "data" / "bccd" / "images" / "val").iterdir())
    found = []
    for half in (False, True):
        detector = Detector(load_model(DEMO), torch.device("cpu"), half=half, conf=0.4)
        found.append(torch.as_tensor(detector(file, size=160).xyxy[0]))
    plain, half = found
    assert detector.dtype == detector.model.detect.m[0].weight.dtype == torch.bfloat16 and not log.text
    assert torch.equal(detector.model.detect.anchors, load_model(DEMO).detect.anchors)
    assert len(plain) >= 5 and abs(len(half) - len(plain)) <= 0.1 * len(plain) + 1
    best = box_iou(plain[:, :4], half[:, :4]).amax(1)
    assert (best > 0.85).float().mean() >= 0.9


def test_coordinates_in_four_forms(results: Results) -> None:
    assert np.allclose(results.xyxy[1], XYXY)
    assert np.allclose(results.xywh[0][0], [48, 32, 40, 20, 0.9, 1])
    assert np.allclose(results.xyxyn[0][0], [28 / 128, 22 / 96, 68 / 128, 42 / 96, 0.9, 1])
    assert np.allclose(results.xywhn[0][0], [48 / 128, 32 / 96, 40 / 128, 20 / 96, 0.9, 1])
    results.xyxy[0][0, 0] += 1  # plain tensors, free to be changed
    assert results.n == 2 and results.s == (2, 3, 96, 128) and len(results.t) == 3


def test_text(results: Results, capsys: pytest.CaptureFixture) -> None:
    results.print()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["image 1/2: 96x128 1 red, 2 greens", "image 2/2: 96x128 1 red, 2 greens"]
    assert lines[2].startswith("Speed: ") and lines[2].endswith("(2, 3, 96, 128)")
    assert repr(results) == "<Results of 2 images, 6 detections>"


def test_iterating_gives_one_result_an_image(results: Results) -> None:
    assert [len(r) for r in results] == [1, 1] and len(results.tolist()) == 2
    assert np.array_equal(results[1].ims[0], picture(seed=2)) and results[1].files == ["image1.jpg"]


def test_pandas(results: Results) -> None:
    table = results.pandas().xyxy[0]
    assert list(table.columns) == ["xmin", "ymin", "xmax", "ymax", "confidence", "class", "name"]
    assert table["name"].tolist() == ["green", "green", "red"] and table["class"].tolist() == [1, 1, 0]
    assert np.allclose(table.iloc[0, :5].astype(float), XYXY[0][:5])
    columns = ["xcenter", "ycenter", "width", "height", "confidence", "class", "name"]
    assert list(results.pandas().xywhn[1].columns) == columns
    assert isinstance(results.xyxy[0], torch.Tensor)  # the results themselves stay tensors


def test_pandas_without_detections() -> None:
    empty = Detector(FakeModel([]), torch.device("cpu"))(picture())
    assert len(empty.pandas().xyxy[0]) == 0 and "(no detections)" in str(empty)


def test_render_and_save(results: Results, tmp_path: Path) -> None:
    drawn = results.render()
    assert drawn[0].shape == (96, 128, 3) and not np.array_equal(drawn[0], picture(seed=1))
    assert np.array_equal(results.ims[0], picture(seed=1))
    results.files = ["a.png", "A.jpg"]
    assert results.save(save_dir=tmp_path / "exp") == tmp_path / "exp"
    assert results.save(save_dir=tmp_path / "exp") == tmp_path / "exp2"
    assert results.save(save_dir=tmp_path / "exp", exist_ok=True) == tmp_path / "exp"
    assert sorted(p.name for p in (tmp_path / "exp").iterdir()) == ["A-2.jpg", "a.jpg"]


def test_crops(results: Results, tmp_path: Path) -> None:
    crops = results.crop(save_dir=tmp_path / "exp")
    assert len(crops) == 6 and crops[0]["label"] == "green 0.90" and crops[0]["cls"] == 1
    assert crops[0]["box"] == [28, 22, 68, 42] and crops[0]["im"].shape == (31, 51, 3)
    names = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.jpg"))
    assert names[:2] == ["exp/crops/green/image0-2.jpg", "exp/crops/green/image0.jpg"] and len(names) == 6
    assert read_image(tmp_path / "exp/crops/red/image1.jpg").shape == (21, 21, 3)
    assert len(results.crop(save=False)) == 6


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, models; assert 'torch' not in sys.modules, 'torch was loaded'; assert callable(models.load)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_load_stays_a_function_whatever_was_imported_before(checkpoint: Path) -> None:
    from models import load
    from models.loading import load_model

    assert callable(load_model)
    detector = load(checkpoint, "cpu", conf=0.4)
    assert detector.names == NAMES and detector.stride == 32 and detector.conf == 0.4
    with pytest.raises(CheckpointError, match="gone.pt: no such file"):
        load("gone.pt", "cpu")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (0, 4)), "image 0: is empty"),
        (torch.zeros(3, 64, 64), r"tensor: expected \(batch, 3, height, width\)"),
        (torch.zeros(1, 4, 64, 64), r"tensor: expected \(batch, 3, height, width\)"),
    ],
)
def test_images_of_no_use_are_one_line(checkpoint: Path, image: object, message: str) -> None:
    from models.api import load

    with pytest.raises(SourceError, match=message):
        load(checkpoint, "cpu")(image)


def test_sizes_and_class_numbers_of_odd_types(checkpoint: Path) -> None:
    from models.api import load

    model = load(checkpoint, "cpu", classes=0)
    assert model.classes == [0]
    assert model.round_size(np.int64(33)) == (64, 64)
    for size in ("64", None, 64.5):
        with pytest.raises(ConfigError, match="expected whole numbers"):
            model.round_size(size)
