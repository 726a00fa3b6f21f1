"""Settings are checked once, and the message names file, line and nearest word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from utils.config import DataConfig, Hyp, TrainConfig
from utils.errors import ConfigError, DataError
from utils.files import ROOT, load_yaml


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults_are_those_of_the_low_file(reference: Path) -> None:
    low = json.loads((reference / "loss.json").read_text())["hyp_base"]
    assert Hyp.from_dict(low) == Hyp()
    assert Hyp.load("hyp.scratch-low.yaml") == (Hyp(), [])


@pytest.mark.parametrize("path", sorted((ROOT / "data" / "hyps").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_hyp_file_is_complete(path: Path) -> None:
    assert Hyp.load(path)[1] == []


def test_loss_gains_scale_with_levels_classes_and_size() -> None:
    hyp = Hyp().scaled(levels=4, nc=40, imgsz=1280)
    assert hyp.box == pytest.approx(0.05 * 3 / 4)
    assert hyp.cls == pytest.approx(0.5 * 40 / 80 * 3 / 4)
    assert hyp.obj == pytest.approx(1.0 * 4 * 3 / 4)
    assert Hyp().box == 0.05


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr0: 0.01\nlfr: 0.1\n", ":2: unknown hyper-parameter 'lfr', did you mean 'lrf'?"),
        ("lr0: fast\n", ":1: lr0: expected a number, found 'fast'"),
        ("lr0: .nan\n", ":1: lr0: expected a number"),
        ("lr0: true\n", ":1: lr0: expected a number"),
        ("mosaic: 1.5\n", ":1: mosaic: 1.5 is outside 0..1"),
        ("lr0: 0.01\nlr0: 0.02\n", ":2: key 'lr0' appears twice"),
        ("- 1\n- 2\n", "expected 'key: value' lines, found a list"),
    ],
)
def test_hyp_faults(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "hyp.yaml", text)
    with pytest.raises(ConfigError) as error:
        Hyp.load(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_hyp_accepts_what_yaml_reads_as_text(tmp_path: Path) -> None:
    hyp, missing = Hyp.load(write(tmp_path / "h.yaml", "lr0: 1e-3\n"))
    assert hyp.lr0 == 0.001 and "momentum" in missing and "anchors" not in missing


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
    return tmp_path


BASE = "train: images/train\nval: images/val\n"


def test_paths_are_resolved_beside_the_yaml(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    data = DataConfig.load(write(data_folder / "data.yaml", "path: .\n" + BASE + "names: [a, b]\n"))
    assert data.train == ((data_folder / "images" / "train").resolve(),)
    assert data.names == {0: "a", 1: "b"} and data.nc == 2 and data.test == ()
    with pytest.raises(DataError, match="has no 'test:' entry"):
        data.split("test")


def test_lists_single_class_and_a_folder_too_high(data_folder: Path) -> None:
    text = "train: [images/train, images/val]\nval: ../images/val\nnames: {0: a, 1: b}\n"
    data = DataConfig.load(write(data_folder / "data.yaml", text), single_cls=True)
    assert len(data.train) == 2 and data.names == {0: "item"}
    assert data.val == ((data_folder / "images" / "val").resolve(),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE, "'names:' is missing"),
        ("val: images/val\nnames: [a]\n", "'train:' is missing"),
        (BASE + "nams: [a]\n", "'names:' is missing, is it the 'nams' line?"),
        (BASE + "names: [a, b]\nnc: 3\n", ":4: nc: 3 does not agree with the 2 names"),
        (BASE + "names: {a: 0}\n", "keys must be whole numbers"),
        (BASE + "names: {0: a, 2: b}\n", "without gaps"),
        ("train: images/none\nval: images/val\nnames: [a]\n", ":1: train:"),
        ("path: nowhere\n" + BASE + "names: [a]\n", ":1: path: nowhere: no such folder"),
        ("path: nowhere\n" + BASE + "names: [a]\ndownload: bash rm -rf /\n", "nothing is downloaded here"),
        (BASE + "names: &n [a]\nother: *n\n", "aliases"),
        ("a: !!python/object/apply:os.system ['true']\n", ":1:"),
    ],
)
def test_data_faults(data_folder: Path, text: str, message: str) -> None:
    path = write(data_folder / "data.yaml", text)
    with pytest.raises((DataError, ConfigError)) as error:
        DataConfig.load(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_freeze_means_a_count_or_a_list() -> None:
    assert TrainConfig(freeze=(10,)).freeze_layers == tuple(range(10))
    assert TrainConfig(freeze=(0, 4)).freeze_layers == (0, 4)
    assert TrainConfig().freeze_layers == ()


def test_an_aliased_yaml_bomb_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match="aliases"):
        Hyp.load(write(tmp_path / "bomb.yaml", "\n".join(lines)))


def test_a_yaml_in_another_encoding_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "d.yaml"
    file.write_bytes(b"train: a\nval: a\nnames: [caf\xe9]\n")
    with pytest.raises(ConfigError, match=r"d\.yaml:3: not a text file in UTF-8"):
        load_yaml(file)


def test_names_in_one_string_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    file = tmp_path / "d.yaml"
    file.write_text("train: images\nval: images\nnames: 'a,b'\n")
    with pytest.raises(DataError, match=r"d\.yaml:3: names: 'a,b' is one name; several are a list: \[a,b\]"):
        DataConfig.load(file)


def test_a_test_split_that_is_not_there_is_named_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    file = tmp_path / "d.yaml"
    file.write_text("train: images\nval: images\ntest: imgaes\nnames: [a]\n")
    data = DataConfig.load(file)
    assert data.test == () and "imgaes" in data.missing_test
    with pytest.raises(DataError, match=r"d\.yaml:3: test: .*imgaes: no such folder or file"):
        data.split("test")
