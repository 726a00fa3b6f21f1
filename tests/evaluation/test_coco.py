"""COCO's numbers equal pycocotools', for every kind of image id."""

import contextlib
import io
import json

import numpy as np
import pytest

from tests.evaluation import bccd
from utils import coco
from utils.errors import DataError


def by_pycocotools(truth, detections):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = {"info": {}, **truth}
        gt.createIndex()
        evaluation = COCOeval(gt, gt.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def bccd_as_coco(ids):
    pairs = bccd.load()
    categories = (0, 1, 2)
    truth = coco.ground_truth(ids, [bccd.SIZE] * len(pairs), [labels for _, labels in pairs], bccd.NAMES, categories)
    found = [entry for i, (rows, _) in zip(ids, pairs) for entry in coco.detections_to_coco(i, rows, categories)]
    return truth, found


def test_equals_pycocotools_on_bccd():
    truth, found = bccd_as_coco(range(1, 88))
    stats = coco.evaluate_coco(truth, found)
    np.testing.assert_allclose(list(stats.values()), by_pycocotools(truth, found), atol=1e-6)
    assert 0.4 < stats["AP"] < stats["AP50"] < 0.95


def test_text_ids_and_unknown_images():
    truth, found = bccd_as_coco([f"img_{i:03}" for i in range(87)])
    stranger = dict(found[0], image_id="elsewhere")
    assert coco.evaluate_coco(truth, [*found, stranger]) == coco.evaluate_coco(*bccd_as_coco(range(87)))


def test_no_detections_at_all_is_zero():
    truth, _ = bccd_as_coco(range(87))
    assert coco.evaluate_coco(truth, [])["AP"] == 0


def test_inputs_are_not_changed():
    truth, found = bccd_as_coco(range(87))
    before = json.dumps([truth, found])
    coco.evaluate_coco(truth, found)
    assert json.dumps([truth, found]) == before


def test_image_ids():
    assert coco.image_ids(["a/000042.jpg", "a/cat.jpg", "a/1e3.jpg"]) == [42, "cat", "1e3"]
    assert coco.image_ids(["a/7.jpg", "b/07.jpg"]) == ["a/7.jpg", "b/07.jpg"]  # both would be 7


def test_category_ids():
    assert coco.category_ids(["/data/coco/val2017.txt"], 80)[-1] == 90
    assert len(coco.COCO_CATEGORY_IDS) == 80 and coco.COCO_CATEGORY_IDS[11] == 13
    assert coco.category_ids(["/data/coco/val2017.txt"], 3) == (0, 1, 2)
    assert coco.category_ids(["/data/other/val"], 80) == tuple(range(80))


def test_result_entries_are_rounded():
    entry = coco.detections_to_coco(3, np.array([[1.00049, 2, 11.12345, 22.5, 0.1234567, 1]]), (1, 5))
    assert entry == [{"image_id": 3, "category_id": 5, "bbox": [1.0, 2.0, 10.123, 20.5], "score": 0.12346}]
    assert json.dumps(entry)


@pytest.mark.parametrize("text", ["[]", "{", '{"images": []}'])
def test_foreign_annotation_file_is_one_line(tmp_path, text):
    file = tmp_path / "annotations.json"
    file.write_text(text)
    with pytest.raises(DataError, match="not a COCO annotation file"):
        coco.load_annotations(file)


def test_what_the_evaluation_does_not_look_at_may_be_left_out():
    """300 crowded detections an image, many of the same score once rounded: the same numbers, to the last bit."""
    rng = np.random.default_rng(0)
    labels, found = [], []
    for _ in range(8):
        corners = rng.uniform(0, 200, (12, 2))
        boxes = np.concatenate((corners, corners + rng.uniform(20, 60, (12, 2))), 1)
        labels.append(np.concatenate((rng.integers(0, 2, (12, 1)), boxes), 1))
        scores = rng.integers(0, 12, (300, 1)) / 12 + rng.uniform(-2e-6, 2e-6, (300, 1))
        moved = boxes[rng.integers(0, 12, 300)] + rng.normal(0, 5, (300, 4))
        found.append(np.concatenate((moved, scores, rng.choice(2, (300, 1), p=[0.8, 0.2])), 1))
    names, ids = {0: "a", 1: "b"}, list(range(8))
    truth = coco.ground_truth(ids, [(260, 260)] * 8, labels, names, (0, 1))
    whole = [entry for i, rows in zip(ids, found) for entry in coco.detections_to_coco(i, rows, (0, 1))]
    kept = [coco.most_confident(rows) for rows in found]
    fewer = [entry for i, rows in zip(ids, kept) for entry in coco.detections_to_coco(i, rows, (0, 1))]
    assert len(fewer) < 0.7 * len(whole) and all((rows[:, 5] == 0).sum() == 100 for rows in kept)
    expected = coco.evaluate_coco(truth, whole)
    assert coco.evaluate_coco(truth, fewer) == expected and expected["AP"] > 0.1
    assert np.array_equal(coco.most_confident(found[0][:100]), found[0][:100])
    assert coco.most_confident(np.empty((0, 6))).shape == (0, 6)
