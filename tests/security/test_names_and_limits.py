"""What file names, class names and sizes from outside may do: nothing to the terminal, a spreadsheet, a diagram."""

from __future__ import annotations

import json
import logging
import os
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from scripts.faults.hostile import png_header, zeros_bomb
from utils.coco import load_annotations
from utils.config import DataConfig, TrainConfig
from utils.console import LOGGER, setup_console
from utils.curves import plot_confidence_curve, plot_confusion_matrix, plot_labels
from utils.errors import ConfigError, DataError, ResourceError, SourceError, UserError, run_cli
from utils.files import MAX_YAML_VALUES, load_yaml, new_run_dir, parse_yaml
from utils.images import list_images, read_image, walk
from utils.labels import parse_labels
from utils.loggers import COLUMNS, RunLogger, read_results, results_header, results_row
from utils.safe_names import UniqueNames, class_name_fault, printable, spreadsheet_text
from utils.sources import list_files, open_source

ANSI = "\x1b]0;owned\x07\x1b[2J"


def test_an_error_line_shows_control_characters(capsys: pytest.CaptureFixture) -> None:
    def main(argv: list[str]) -> int:
        raise UserError(f"{ANSI}\nerror: all is well {'x' * 5000}")

    assert run_cli(main, []) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "\x1b" not in err and "\\x1b[2J\\nerror" in err and len(err) < 2100


def test_log_lines_show_control_characters_but_keep_lines_and_colours(capsys: pytest.CaptureFixture) -> None:
    setup_console()
    level = LOGGER.level
    LOGGER.setLevel(logging.INFO)
    LOGGER.info(f"one\n\ttwo \x1b[1mbold\x1b[0m {ANSI} \u202e")
    LOGGER.setLevel(level)
    out = capsys.readouterr().out
    assert "one\n\ttwo \x1b[1mbold\x1b[0m \\x1b]0;owned\\x07\\x1b[2J \\u202e" in out


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("  =1", "'  =1"),
        ("\t=1", "'\t=1"),
        ("＝1", "'＝1"),
        ("a;=1;+2", "a;'=1;'+2"),
        ("a-b.jpg", "a-b.jpg"),
        ("a; b", "a; b"),
        ("plain", "plain"),
    ],
)
def test_spreadsheet_cells(text: str, cell: str) -> None:
    assert spreadsheet_text(text) == cell


def test_printable_keeps_what_it_is_told() -> None:
    assert printable("a\nb\x07") == "a\\nb\\x07" and printable("a\nb\x07", keep="\n") == "a\nb\\x07"


def test_class_names() -> None:
    assert class_name_fault("größe <b>$x$ ../a") is None
    assert "control character '\\x1b'" in class_name_fault(ANSI) and "longer than 200" in class_name_fault("x" * 201)


def test_stems_leave_room_for_numbers_and_suffixes() -> None:
    names = UniqueNames()
    first, second = names.take("ä" * 200), names.take("ä" * 200)
    assert first != second and max(len(os.fsencode(n)) for n in (first, second)) < 230
    assert names.take("x" * 220) == "x" * 220


def test_diagrams_take_any_name(tmp_path: Path) -> None:
    names = ["$\\frac{$x", "$", "_hidden", "a" * 200, "\\$5"]
    values = np.random.default_rng(0).random((5, 10))
    plot_confidence_curve(np.linspace(0, 1, 10), values, names, tmp_path / "a.png", "F1")
    plot_confusion_matrix(np.ones((6, 6)), names, tmp_path / "b.png")
    plot_labels(np.full((5, 5), 0.5), dict(enumerate(names)), tmp_path / "c.png")
    assert all(cv2.imread(str(tmp_path / f"{n}.png")) is not None for n in "abc")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 60, r"a.yaml:1: nested deeper than 50 levels"),
        ("a: [" + "1," * MAX_YAML_VALUES + "]", "more than 100,000 values"),
        ("x: 1\na: " + "9" * 61, "a.yaml:2: a number of 61 characters"),
        ("a: !!bool x", "a.yaml:1: 'x' is no bool"),
        ("a: 2001-99-99", "a.yaml:1: '2001-99-99' is no timestamp"),
        ("{[a]: 1}", "a.yaml:1: a key must be a plain word"),
        ("a: !!map [b]", "a.yaml:1: expected a mapping node"),
        ("a: !!python/name:os.system", "a.yaml:1: could not determine a constructor"),
        ("a: &x 1\nb: *x", "a.yaml:2: YAML aliases"),
    ],
)
def test_yaml_limits_name_the_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, Path("a.yaml"))


def test_yaml_from_a_pipe_or_an_endless_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="not a file"):
            load_yaml(path)


def test_folders_are_walked_once_through_circles_and_depth(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.png").write_bytes(b"")
    (tmp_path / "a" / ".hidden").mkdir()
    for name in ("c1", "c2", "c3"):
        (tmp_path / "a" / name).symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a" / "self")
    assert [Path(root).name for root, _ in walk(tmp_path / "a")] == ["a", "b", "c1"]
    assert list_images(tmp_path / "a") == [str(tmp_path / "a" / "b" / "x.png")]


def test_two_stars_find_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/x.png", "a/b/x.png", "a/b/c/x.png", "y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert list_files("**/*.png") == ["a/b/c/x.png", "a/b/x.png", "a/x.png", "y.png"]
    assert list_files("a/**/b/**/x.png") == ["a/b/c/x.png", "a/b/x.png"]
    found = [path.removeprefix(f"{tmp_path}/") for path in list_files(f"{tmp_path}/a/**")]
    assert found == ["a/b/c/x.png", "a/b/x.png", "a/back/y.png", "a/x.png"]


@pytest.mark.parametrize("line", ["file:///etc/passwd", "concat:a|b", "videotestsrc ! fakesink", "nothing.mp4", "-1"])
def test_streams_lists_hold_addresses_only(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.streams").write_text(f"# mine\n{line}\n")
    with pytest.raises(SourceError, match=r"a.streams:2: .*expected an address"):
        open_source(str(tmp_path / "a.streams"))


def test_a_second_header_cannot_hide_a_bomb(tmp_path: Path) -> None:
    whole = zeros_bomb(3000)
    small = png_header(20, 20)[8:33]
    for name, data in (
        ("two.png", whole[:8] + small + whole[8:]),
        ("late.png", whole[:8] + small[:-4] * 2 + whole[8:]),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="3000x3000 is more than 1,000 pixels|cut short|cannot be decoded"):
            read_image(tmp_path / name, max_pixels=1000)
    chunk = (
        whole[:8] + b"\0\0\0\x08tEXt" + b"\0\0\0\x14" * 2 + zlib.crc32(b"tEXt" + b"\0\0\0\x14" * 2).to_bytes(4, "big")
    )
    (tmp_path / "text.png").write_bytes(chunk + whole[8:])
    with pytest.raises(DataError, match="cut short"):
        read_image(tmp_path / "text.png", max_pixels=1000)


def test_postscript_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen.__init__", refuse)
    (tmp_path / "a.tif").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match="not an image"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("1e308 .5 .5 .1 .1", "class 1e\\+308 is too large"),
        ("0 .5 .5 1e-50 .1", "without width"),
        ("0 .5 .5 .5000000001 .5 .5000000001 .6", "without width"),
        ("0 " + ".5 " * 1_000_000, "a row of"),
    ],
)
def test_numbers_that_float32_cannot_hold(row: str, reason: str) -> None:
    result = parse_labels(row)
    assert len(result.boxes) == 0 and len(result.faults) == 1
    with pytest.raises(DataError, match=reason):
        raise DataError(result.faults[0][1])


def test_a_run_folder_with_a_link_out_of_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    run = new_run_dir(tmp_path / "runs", "exp")
    (run / "weights").mkdir()
    (run / "weights" / "best.pt").symlink_to("last.pt")  # inside: fine
    assert new_run_dir(tmp_path / "runs", "exp", exist_ok=True) == run
    (run / "labels").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ResourceError, match="labels: a link out of the run's folder"):
        new_run_dir(tmp_path / "runs", "exp", exist_ok=True)


def test_damaged_results_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.loggers._tensorboard_writer", lambda run_dir: None)
    rows = [results_row(epoch, dict.fromkeys(COLUMNS, 0.5)) for epoch in range(3)]
    text = results_header() + rows[0] + "=cmd(),1\n\x00\xff\n" + rows[1] + rows[2] + "7,half"
    (tmp_path / "results.csv").write_text(text, encoding="utf-8")
    assert read_results(tmp_path / "results.csv")["epoch"] == [0, 1, 2]
    RunLogger(tmp_path, first_epoch=2)
    assert (tmp_path / "results.csv").read_text() == results_header() + rows[0] + rows[1]
    (tmp_path / "results.csv").write_bytes(b"")
    assert read_results(tmp_path / "results.csv") == {}


GOOD = {"id": 1, "image_id": "a", "category_id": 0, "bbox": [1, 2, 3, 4], "area": 12.0, "iscrowd": 0}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "recursion"),
        ('{"images": 5, "annotations": [], "categories": []}', "images is no list"),
        ('{"images": [{"id": [1]}], "annotations": [], "categories": []}', "plain id"),
        (GOOD | {"bbox": "abcd"}, "annotation 0 has no box"),
        (GOOD | {"area": float("nan")}, "annotation 0 has no box"),
        (GOOD | {"image_id": "b"}, "annotation 0 is of an image"),
        (GOOD | {"category_id": True}, "annotation 0 is of an image"),
        (GOOD | {"iscrowd": "x"}, "iscrowd"),
    ],
)
def test_annotation_files_are_checked(tmp_path: Path, text: str | dict, reason: str) -> None:
    if isinstance(text, dict):
        text = json.dumps({"images": [{"id": "a"}], "annotations": [text], "categories": [{"id": 0}]})
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=f"not a COCO annotation file .*{reason}"):
        load_annotations(tmp_path / "a.json")


def test_good_annotations_are_read(tmp_path: Path) -> None:
    content = {"images": [{"id": "a"}], "annotations": [GOOD], "categories": [{"id": 0}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert load_annotations(tmp_path / "a.json") == content


@pytest.mark.parametrize("path", ["~nosuchuser/x", "a\\0b", "x" * 5000])
def test_a_dataset_path_that_cannot_be_is_one_line(tmp_path: Path, path: str, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "d.yaml").write_text(f'path: "{path}"\ntrain: x\nval: x\nnames: [a]\n')
    assert run_cli(lambda argv: DataConfig.load(tmp_path / "d.yaml"), []) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_freezing_a_thousand_million_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="--freeze"):
        TrainConfig(freeze=(1_000_000_000,))
