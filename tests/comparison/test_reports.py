"""What reports hold, and that no name from outside does anything in them."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from comparison.charts import curve_chart
from comparison.costs import time_inference
from comparison.examples import choose, examples, image_f1
from comparison.findings import analyse
from comparison.intervals import Interval
from comparison.matching import Predictions
from comparison.measuring import verdicts
from comparison.offset_examples import offset_examples
from comparison.predictions import _in_order, aligned, load, save
from comparison.report import Comparison, duration, interval
from comparison.report_html import page
from comparison.report_text import CSV_HEADER, markdown, table_csv
from models.yolo import DetectionModel
from tests.comparison.test_resampling import made_up
from utils.errors import DataError

NAMES = {0: "one", 1: "two", 2: "never"}


class _Tags(HTMLParser):
    """All tags with their attributes, and whether they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_whole_and_holds_nothing_that_runs_or_loads(result: Comparison) -> None:
    html = page(result)
    tags = _Tags()
    tags.feed(html)
    assert tags.open == []
    names = {tag for tag, _ in tags.found}
    assert not names & {"script", "b", "link", "iframe", "object"}
    assert all(not key.startswith("on") for _, attrs in tags.found for key in attrs)
    sources = [attrs["src"] for _, attrs in tags.found if "src" in attrs]
    assert len(sources) == 3 and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "&lt;i&gt;dcn&lt;/i&gt;" in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "&lt;b&gt;bold&lt;/b&gt; less a&amp;b" in html
    assert "no measurable gain: keep a&amp;b" in html and html.count("<svg") == 2


def test_markdown_shows_names_as_they_are(result: Comparison) -> None:
    text = markdown(result)
    assert "<script>" not in text and "&lt;script&gt;alert(1)" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = {line.replace(r"\|", "").count("|") for line in rows if "calc" in line}
    assert len(widths) == 1  # the | in a class name begins no cell
    assert "1.50x" in text and "2.00x" in text and "1.25 GB" in text


def test_csv_is_for_programs_and_spreadsheets(result: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(table_csv(result))))
    assert tuple(rows[0]) == CSV_HEADER
    whole = [row for row in rows if row["part"] == "all" and row["split"] == "test"]
    assert [(row["model"], row["seed"]) for row in whole[3:]] == [
        ("<b>bold</b>", "mean"),
        *[("<b>bold</b>", s) for s in "02"],
    ]
    assert float(whole[3]["difference"]) == 0 and whole[3]["train_seconds"] == "122" and whole[0]["memory_gb"] == ""
    assert any(row["name"].startswith("'=cmd") for row in rows)


def test_rows_add_up_to_the_whole() -> None:
    runs = {"a": [made_up(seed=1)], "b": [made_up(seed=1)]}
    found = analyse("val", runs, NAMES, resamples=100)
    assert [row.name for row in found.of_kind("class")] == ["one", "two"]
    for kind in ("class", "size", "aspect ratio"):
        assert sum(row.labels for row in found.of_kind(kind)) == found.overall.labels
    by_class = [row.scores["a"].map.mean for row in found.of_kind("class")]
    assert np.mean(by_class) == pytest.approx(found.overall.scores["a"].map.mean)
    gain = found.overall.scores["b"].gain
    assert gain.mean == 0 and gain.images_half == 0 and gain.half is None
    assert found.overall == analyse("val", runs, NAMES, resamples=100).overall  # same resamples every time


def without(found: Predictions, share: float) -> Predictions:
    """The predictions less the first ``share`` of each image's detections, which are the surest."""
    kept = [found.of_image(i)[0] for i in range(len(found.paths))]
    kept = [rows[int(len(rows) * share) :] for rows in kept]
    offsets = np.concatenate(([0], np.cumsum([len(rows) for rows in kept])))
    return dataclasses.replace(found, detections=np.concatenate(kept), detection_offsets=offsets)


def blurred(found: Predictions) -> Predictions:
    """The predictions, each box half its size too far to the right."""
    moved = found.detections.copy()
    moved[:, [0, 2]] += ((moved[:, 2] - moved[:, 0]) / 2)[:, None]
    return dataclasses.replace(found, detections=moved)


def test_a_model_that_hits_less_loses(result: Comparison) -> None:
    runs = {"good": [made_up(30)] * 3, "bad": [blurred(made_up(30))] * 3}
    split = analyse("test", runs, NAMES, resamples=100)
    gain = split.overall.scores["bad"].gain
    assert gain.mean < 0 and gain.seeds_half == 0 and 0 < gain.half < -gain.mean
    costs = dict(zip(runs, result.costs.values()))
    (verdict,) = verdicts(split, costs, 3.0)
    assert verdict.kind == "loses" and verdict.text.endswith("keep good")
    (verdict,) = verdicts(split, costs, 3.0, alike=False)
    assert verdict.text.endswith("keep good (but they did not start alike)")
    blank = {name: [without(made_up(30), 1.0)] * 3 for name in runs}
    (verdict,) = verdicts(analyse("test", blank, NAMES, resamples=100), costs, 3.0)
    assert verdict.kind == "unknown" and "train for longer" in verdict.text


def test_predictions_survive_the_file(tmp_path: Path) -> None:
    found = made_up()
    odd = dataclasses.replace(found, paths=("bell\udcff.jpg", *found.paths[1:]))
    file = tmp_path / "a.npz"
    save(odd, file)
    again = load(file)
    assert again.paths == odd.paths
    for name in ("detections", "detection_offsets", "labels", "label_offsets"):
        np.testing.assert_array_equal(getattr(again, name), getattr(odd, name))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="damaged; remove it"):
        load(file)


def test_images_in_another_order_are_put_right() -> None:
    found = made_up()
    turned = _in_order(found, found.paths[::-1])
    assert turned.paths == found.paths[::-1]
    np.testing.assert_array_equal(turned.of_image(0)[0], found.of_image(11)[0])
    back = aligned(turned, found)
    np.testing.assert_array_equal(back.detections, found.detections)
    with pytest.raises(DataError, match="changed during the comparison"):
        aligned(found, dataclasses.replace(found, paths=(*found.paths[:-1], "new.jpg")))


def test_other_labels_of_the_same_images_are_refused() -> None:
    """Corrected between two starts: predictions kept from before hold the old ones."""
    found = made_up()
    with pytest.raises(DataError, match="labels of a split changed .* remove the folder predictions/"):
        aligned(found, dataclasses.replace(found, labels=found.labels + 1))


def test_examples_are_those_that_differ_most(tmp_path: Path) -> None:
    found = made_up(8)
    paths = tuple(str(tmp_path / f"{i}.jpg") for i in range(8))
    for path in paths[1:]:
        cv2.imwrite(path, np.full((500, 700, 3), 127, np.uint8))
    found = dataclasses.replace(found, paths=paths)
    worse = without(found, 0.8)
    gains = [image_f1(*worse.of_image(i)) - image_f1(*found.of_image(i)) for i in range(8)]
    chosen = choose({"a": found, "b": worse}, 4)
    assert min(gains[i] for i in chosen[:2]) >= max(gains[i] for i in range(8) if i not in chosen[:2])
    shown = examples({"a": found, "b": worse}, NAMES, 8)
    assert len(shown) == 7  # the first picture is gone
    captions = [caption for caption, _ in shown[0].pictures]
    assert captions[0] == "labels" and captions[1].startswith("a (F1 ") and captions[2].startswith("b (F1 ")
    picture = cv2.imdecode(np.frombuffer(shown[0].pictures[1][1], np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (343, 480, 3)


def test_offsets_are_shown_of_models_that_have_some(tmp_path: Path) -> None:
    path = str(tmp_path / "a.jpg")
    cv2.imwrite(path, np.random.default_rng(0).integers(0, 255, (80, 120, 3), np.uint8))
    box = np.array([[20, 20, 60, 60, 0.9, 1]], np.float32)
    found = Predictions((path,), box, np.array([0, 1]), np.zeros((0, 5), np.float32), np.array([0, 0]))
    models = {name: DetectionModel(f"{name}.yaml", nc=3).eval() for name in ("yolov5n", "yolov5n-dcn")}
    device = torch.device("cpu")
    ((caption, picture),) = offset_examples(models, dict.fromkeys(models, found), 64, device)
    assert caption == "yolov5n-dcn on a.jpg"
    assert cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR).shape[1] > 3 * 288
    unsure = dataclasses.replace(found, detections=box * np.float32([1, 1, 1, 1, 0.1, 1]))
    assert offset_examples(models, dict.fromkeys(models, unsure), 64, device) == ()


def test_inference_is_timed_and_threads_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comparison.costs.SECONDS_A_MODEL", 0.05)
    models = {name: DetectionModel(f"{name}.yaml", nc=3).eval() for name in ("yolov5n", "yolov5s")}
    torch.set_num_threads(2)
    try:
        times = time_inference(models, 60, torch.device("cpu"))  # rounded up to 64
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert 0 < times["yolov5n"] < times["yolov5s"]


def test_texts() -> None:
    assert interval(Interval(math.nan)) == "-" and interval(Interval(1.25)) == "1.2"
    assert interval(Interval(42.06, 0.83)) == "42.1 +- 0.8"
    assert [duration(s) for s in (12.34, 245, 12_000)] == ["12.3 s", "4 min 05 s", "3 h 20 min"]


@pytest.mark.parametrize("curves", [{"a": [[]]}, {"a": [[0.0]]}, {"a": [[1.0, 50.0], [2.0]], "b": [[]]}])
def test_curves_of_any_length_are_drawn(curves) -> None:
    chart = curve_chart(curves)
    assert chart.startswith("<svg") and "nan" not in chart
