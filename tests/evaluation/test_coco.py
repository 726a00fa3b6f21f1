"""COCO's numbers equal pycocotools', for every kind of image id."""

import contextlib
import io
import json
import pickle
from functools import partial

import numpy as np
import pytest

from tests.evaluation import bccd
from utils.coco import COCO_CATEGORY_IDS, category_ids, ground_truth, image_ids, load_annotations
from utils.coco_ap import Detections, Evaluation, prepare_evaluation
from utils.errors import DataError
from utils.helpers import Helpers


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


def evaluate_coco(truth, found, ids=None):
    return Evaluation(truth, range(len(truth["images"])) if ids is None else ids, found).stats()


def bccd_as_coco(ids):
    pairs = bccd.load()
    categories = (0, 1, 2)
    truth = ground_truth(ids, [bccd.SIZE] * len(pairs), [labels for _, labels in pairs], bccd.NAMES, categories)
    return truth, Detections.of([rows for rows, _ in pairs], categories)


def test_equals_pycocotools_on_bccd():
    ids = range(1, 88)
    truth, found = bccd_as_coco(ids)
    stats = evaluate_coco(truth, found, ids)
    np.testing.assert_allclose(list(stats.values()), by_pycocotools(truth, found.entries(ids)), atol=1e-6)
    assert 0.4 < stats["AP"] < stats["AP50"] < 0.95


def test_text_ids_and_unknown_images():
    """An image that is not among the labels, the first, does not count."""
    ids = [f"img_{i:03}" for i in range(87)]
    truth, found = bccd_as_coco(ids)
    for part in ("images", "annotations"):
        truth[part] = [entry for entry in truth[part] if "img_000" not in (entry["id"], entry.get("image_id"))]
    without, others = bccd_as_coco(range(87))
    without["annotations"] = [entry for entry in without["annotations"] if entry["image_id"] != 0]
    assert evaluate_coco(truth, found, ids) == evaluate_coco(without, others[others.image != 0])


def test_images_in_any_order_and_equal_scores():
    """Among equal scores the image with the lower id comes first, as in pycocotools."""
    rng = np.random.default_rng(1)
    ids = rng.permutation(40).tolist()
    labels = [np.array([[0, 10, 10, 50, 50]], float)] * 40
    found = [np.array([[10, 10, 50, 50, score, 0]]) + rng.normal(0, 3, (1, 6)) * ([1] * 4 + [0] * 2) for score in
             rng.choice([0.3, 0.6, 0.9], 40)]  # fmt: skip
    found[::3] = [rows + [40, 40, 40, 40, 0, 0] for rows in found[::3]]
    truth = ground_truth(ids, [(200, 200)] * 40, labels, {0: "a"}, (0,))
    detections = Detections.of(found, (0,))
    expected = by_pycocotools(truth, detections.entries(ids))
    np.testing.assert_allclose(list(evaluate_coco(truth, detections, ids).values()), expected, atol=1e-12)


def test_an_image_listed_twice_counts_once():
    truth, found = bccd_as_coco(range(87))
    twice = {**truth, "images": [truth["images"][0], *truth["images"]]}
    assert evaluate_coco(twice, found, range(87)) == evaluate_coco(truth, found)


def test_no_detections_at_all_is_zero():
    truth, found = bccd_as_coco(range(87))
    assert evaluate_coco(truth, found[found.image < 0])["AP"] == 0


def test_inputs_are_not_changed():
    truth, found = bccd_as_coco(range(87))
    before = json.dumps([truth, found.entries(range(87))])
    evaluate_coco(truth, found)
    assert json.dumps([truth, found.entries(range(87))]) == before


@pytest.mark.parametrize("shares", [2, 3, 7])
def test_classes_dealt_out_give_the_same_numbers_to_the_last_bit(shares):
    """With category numbers in another order than the categories are listed, one without labels, one without
    detections, and detections of one that is not listed."""
    rng = np.random.default_rng(shares)
    labels, rows = [], []
    for _ in range(12):
        corners = rng.uniform(0, 200, (9, 2))
        boxes = np.concatenate((corners, corners + rng.uniform(10, 60, (9, 2))), 1)
        labels.append(np.concatenate((rng.integers(0, 4, (9, 1)), boxes), 1))
        moved = boxes[rng.integers(0, 9, 40)] + rng.normal(0, 4, (40, 4))
        rows.append(np.concatenate((moved, rng.random((40, 1)).round(1), rng.integers(1, 6, (40, 1))), 1))
    categories = (11, 5, 7, 3, 90, 4)
    truth = ground_truth(range(12), [(260, 260)] * 12, labels, dict(enumerate("abcde")), categories)
    found = Detections.of(rows, categories)
    calls = []

    def begin(*call):
        calls.append(call[1:])
        return partial(*pickle.loads(pickle.dumps(call)))

    expected = evaluate_coco(truth, found)
    assert Evaluation(truth, range(12), found, begin, shares).stats() == expected and 0 < expected["AP"] < 1
    assert sorted(kind for call in calls for kind in call[0]) == [3, 5, 7, 11, 90] and len(calls) == min(shares, 5)
    known = found[np.isin(found.categories, [3, 5, 7, 11, 90])]
    np.testing.assert_allclose(list(expected.values()), by_pycocotools(truth, known.entries(range(12))), atol=1e-12)


def test_helpers_evaluate_the_classes():
    truth, found = bccd_as_coco(range(87))
    with Helpers(cores=8, prepare=[prepare_evaluation]) as helpers:
        assert Evaluation(truth, range(87), found, helpers.begin, helpers.count).stats() == evaluate_coco(truth, found)


def test_image_ids():
    assert image_ids(["a/000042.jpg", "a/cat.jpg", "a/1e3.jpg"]) == [42, "cat", "1e3"]
    assert image_ids(["a/7.jpg", "b/07.jpg"]) == ["a/7.jpg", "b/07.jpg"]  # both would be 7


def test_category_ids():
    assert category_ids(["/data/coco/val2017.txt"], 80)[-1] == 90
    assert len(COCO_CATEGORY_IDS) == 80 and COCO_CATEGORY_IDS[11] == 13
    assert category_ids(["/data/coco/val2017.txt"], 3) == (0, 1, 2)
    assert category_ids(["/data/other/val"], 80) == tuple(range(80))


def test_result_entries_are_rounded():
    entry = Detections.of([np.array([[1.00049, 2, 11.12345, 22.5, 0.1234567, 1]])], (1, 5)).entries([3])
    assert entry == [{"image_id": 3, "category_id": 5, "bbox": [1.0, 2.0, 10.123, 20.5], "score": 0.12346}]
    assert json.dumps(entry)


@pytest.mark.parametrize("text", ["[]", "{", '{"images": []}'])
def test_foreign_annotation_file_is_one_line(tmp_path, text):
    file = tmp_path / "annotations.json"
    file.write_text(text)
    with pytest.raises(DataError, match="not a COCO annotation file"):
        load_annotations(file)


def test_what_the_evaluation_does_not_look_at_may_be_left_out():
    """300 crowded detections an image, many of the same score once rounded: the same numbers, to the last bit."""
    rng = np.random.default_rng(0)
    labels, rows = [], []
    for _ in range(8):
        corners = rng.uniform(0, 200, (12, 2))
        boxes = np.concatenate((corners, corners + rng.uniform(20, 60, (12, 2))), 1)
        labels.append(np.concatenate((rng.integers(0, 2, (12, 1)), boxes), 1))
        scores = rng.integers(0, 12, (300, 1)) / 12 + rng.uniform(-2e-6, 2e-6, (300, 1))
        moved = boxes[rng.integers(0, 12, 300)] + rng.normal(0, 5, (300, 4))
        rows.append(np.concatenate((moved, scores, rng.choice(2, (300, 1), p=[0.8, 0.2])), 1))
    found = Detections.of(rows, (0, 1))
    kept = found.most_confident()
    batches = [Detections.of(rows[first : first + 3], (0, 1), first).most_confident() for first in range(0, 8, 3)]
    assert Detections.joined(batches).entries(range(8)) == kept.entries(range(8))
    assert len(kept) < 0.7 * len(found) and (np.bincount(kept.image[kept.categories == 0]) == 100).all()
    truth = ground_truth(range(8), [(260, 260)] * 8, labels, {0: "a", 1: "b"}, (0, 1))
    expected = by_pycocotools(truth, found.entries(range(8)))
    np.testing.assert_allclose(by_pycocotools(truth, kept.entries(range(8))), expected, atol=0)
    np.testing.assert_allclose(list(evaluate_coco(truth, found).values()), expected, atol=1e-12)
    assert len(kept.most_confident()) == len(kept) and len(found[found.image < 0].most_confident()) == 0
