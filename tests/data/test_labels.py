"""Label rows: what they mean and what each fault is called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from utils.errors import DataError
from utils.labels import label_path, parse_labels, read_labels


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("/d/images/train/a.jpg", "/d/labels/train/a.txt"),
        ("images/a.b.png", "labels/a.b.txt"),
        ("/images/set/images/a.jpg", "/images/set/labels/a.txt"),
        ("images/x/images/a.jpg", "images/x/labels/a.txt"),
        ("/d/pictures/a.jpg", "/d/pictures/a.txt"),
        ("/d/myimages/a.jpg", "/d/myimages/a.txt"),
        ("a.jpg", "a.txt"),
    ],
)
def test_label_path(image: str, label: str) -> None:
    assert label_path(image) == label


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("0 .5 .5 .1", "4 columns, expected 5: class cx cy w h"),
        ("0 .5 .5 .1 .1 .9", "6 columns, expected 5: class cx cy w h; a file saved with confidences?"),
        ("0 .1 .1 .2 .1 .2 .2 .1", "8 columns: a polygon is a class and pairs x y"),
        ("0,.5,.5,.1,.1", "numbers must be separated by blanks"),
        ("cat .5 .5 .1 .1", "'cat' is not a number"),
        ("0 .5 nan .1 .1", "NaN or infinite value"),
        ("0 .5 inf .1 .1", "NaN or infinite value"),
        ("0 -.2 .5 .1 .1", "negative value -0.2"),
        ("0 .5 .5 -.001 .1", "negative value -0.001"),
        ("-1 .5 .5 .1 .1", "class -1 is negative"),
        ("2.7 .5 .5 .1 .1", "class 2.7 is not a whole number"),
        ("3 .5 .5 .1 .1", r"class 3 but the data set has 3 names \(0..2\)"),
        ("0 .5 1.02 .1 .1", "value 1.02 is outside 0..1"),
        ("0 320 240 64 64", "value 320 is outside 0..1; are these pixels?"),
        ("0 .5 .5 0 .1", "box without width or height"),
        ("0 .5 .5 .5 .6 .5 .7", "box without width or height"),
    ],
)
def test_a_faulty_row_is_named_and_only_it_is_dropped(row: str, reason: str) -> None:
    result = parse_labels(f"1 .5 .5 .2 .2\n\n{row}\n2.0 .25 .25 .1 .1\n", nc=3)
    assert result.boxes[:, 0].tolist() == [1, 2] and result.rows == 3
    ((line, text),) = result.faults
    assert line == 3
    assert __import__("re").match(reason, text), text


def test_a_hair_outside_is_clipped_and_counted() -> None:
    result = parse_labels("0 .5 1.005 .1 .1\n0 -.004 .5 .1 .1\n0 .5 .5 .1 .1")
    np.testing.assert_allclose(result.boxes[:2, 1:3], [(0.5, 1), (0, 0.5)])
    assert result.clipped == 2 and not result.faults


def test_duplicates_are_removed_in_order() -> None:
    result = parse_labels("1 .5 .5 .1 .1\n0 .5 .5 .1 .1\n1 0.50 .5 .1 .1\n")
    assert result.boxes[:, 0].tolist() == [1, 0] and result.duplicates == 1


def test_boxes_and_polygons_row_by_row() -> None:
    result = parse_labels("0 .5 .5 .2 .2\n1 .1 .2 .5 .2 .3 .6\n")
    np.testing.assert_allclose(result.boxes, [(0, 0.5, 0.5, 0.2, 0.2), (1, 0.3, 0.4, 0.4, 0.4)], atol=1e-6)
    assert [len(s) for s in result.segments] == [0, 3]
    assert parse_labels("0 .5 .5 .2 .2").segments is None


def test_empty_text_and_byte_order_mark(tmp_path: Path) -> None:
    assert parse_labels("\n  \n").boxes.shape == (0, 5)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf0 .5 .5 .1 .1\r\n")
    assert len(read_labels(tmp_path / "a.txt").boxes) == 1
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match="b.txt: not a text file"):
        read_labels(tmp_path / "b.txt")


@pytest.mark.parametrize(
    "flaw", ["", "0 .5 .5 .1", "0 .5 .5 0 .1", "9 .5 .5 .1 .1", "0 .1 .1 .2 .1 .2 .2", "x .5 .5 .1 .1"]
)
def test_many_rows_are_read_as_few_are(flaw: str) -> None:
    """Long files of boxes are read all at once; the result is that of reading row by row."""
    rng = np.random.default_rng(0)
    rows = [
        f"{int(c)} {x:.6f} {y:.6f} {w:.6f} {h:.6f}"
        for c, x, y, w, h in rng.uniform(0.01, 0.99, (300, 5)) * (5, 1, 1, 1, 1)
    ]
    rows.insert(150, flaw)
    rows.append(rows[3] if len(flaw) > 10 else "")
    whole = parse_labels("\n".join(rows), nc=5)
    alone = [parse_labels(row, nc=5) for row in rows]
    expected = np.concatenate([part.boxes for part in alone])[: len(whole.boxes)]
    np.testing.assert_array_equal(whole.boxes, expected)
    assert whole.boxes.dtype == np.float32 and whole.rows == sum(part.rows for part in alone)
    assert [reason for _, reason in whole.faults] == [reason for part in alone for _, reason in part.faults]
    assert all(number == 151 for number, _ in whole.faults)
    assert whole.duplicates == (len(flaw) > 10)
    clean = parse_labels("\n".join(rows[:100]), nc=5)
    np.testing.assert_array_equal(clean.boxes, expected[:100])
    assert clean.rows == 100 and clean.segments is None and not clean.faults
