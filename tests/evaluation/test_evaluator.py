"""evaluate() with a model and a loader that are made up: what counts is what the pass does with their output."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine import evaluator
from engine.eval_outputs import BatchPictures, CocoCollector, LabelWriter, save_curves
from engine.evaluator import CPU_CHUNK, evaluate
from utils.cuda_graphs import CudaGraphs
from utils.errors import ConfigError, ResourceError
from utils.loss import LossParts

NAMES = {0: "a", 1: "b"}
CPU = torch.device("cpu")
SIZE = 64  # network input; the originals are twice as large and 96 pixels high, letterboxed with 8 pixels of padding


@pytest.fixture(params=["in turn", "in the background"], autouse=True)
def matching(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matching after each batch as on a CPU, and beside the next one as with a GPU."""
    monkeypatch.setattr(evaluator, "_has_time", lambda device: request.param != "in turn")


def make_batch(count: int, first: int = 0) -> SimpleNamespace:
    """Two labels an image, well apart, one of each class."""
    rows = []
    for index in range(count):
        rows += [[index, 0, 0.25, 0.4, 0.2, 0.2], [index, 1, 0.75, 0.6, 0.3, 0.2]]
    letterbox = SimpleNamespace(original=(96, 128), ratio=(0.5, 0.5), pad=(0.0, 8.0))
    return SimpleNamespace(
        images=torch.full((count, 3, SIZE, SIZE), 255, dtype=torch.uint8),
        targets=torch.tensor(rows),
        paths=[f"folder/{first + i}.jpg" for i in range(count)],
        letterboxes=[letterbox] * count,
    )


class Oracle(nn.Module):
    """Predicts ``targets`` of the batch exactly, moved by ``shift`` pixels, with classes turned by ``turn``."""

    def __init__(self, shift: float = 0.0, turn: int = 0, nc: int = 2) -> None:
        super().__init__()
        self.shift, self.turn, self.nc, self.calls = shift, turn, nc, []

    def forward(self, images):
        assert not self.training and torch.is_inference_mode_enabled()
        assert images.dtype == torch.float32 and float(images.max()) == 1.0
        self.calls.append(len(images))
        rows = torch.zeros(len(images), 2, 5 + self.nc)
        truth = make_batch(1).targets[:, 1:]
        rows[:, :, :4] = truth[:, 1:] * SIZE
        rows[:, :, 0] += self.shift
        rows[:, :, 4] = 0.9
        for i in range(2):
            rows[:, i, 5 + (int(truth[i, 0]) + self.turn) % self.nc] = 1.0
        return rows, [rows[..., None], rows[..., None]]


def run(model, batches, **kwargs):
    return evaluate(model, batches, device=CPU, names=NAMES, show_progress=False, **kwargs)


def test_perfect_detector():
    metrics = run(Oracle(), [make_batch(3), make_batch(2, 3)])
    assert (metrics.map50, metrics.map) == pytest.approx((0.995, 0.995))
    assert (metrics.p, metrics.r) == (1.0, 1.0)
    assert (metrics.images, metrics.labels, metrics.shape) == (5, 10, (3, 3, SIZE, SIZE))
    assert metrics.losses == (0, 0, 0)
    assert metrics.confusion.tolist() == [[5, 0, 0], [0, 5, 0], [0, 0, 0]]
    assert list(metrics.speed) == ["pre-process", "inference", "NMS", "matching"]


def test_wrong_class_and_single_class():
    assert run(Oracle(turn=1), [make_batch(2)]).map == 0
    single = evaluate(
        Oracle(turn=1), [make_batch(2)], device=CPU, names={0: "item"}, single_cls=True, show_progress=False
    )
    assert single.map == pytest.approx(0.995) and single.classes.tolist() == [0]


def test_misplaced_boxes_lose_the_high_thresholds():
    metrics = run(Oracle(shift=2.0), [make_batch(2)])
    assert 0 < metrics.map < metrics.map50


def test_detections_are_in_original_pixels():
    seen = []
    run(Oracle(), [make_batch(1)], observers=[lambda batch, network, results: seen.append((network, results))])
    (network, (result,)) = seen[0]
    assert result.size == (96, 128)
    assert result.labels[0].tolist() == pytest.approx([0, 19.2, 22.4, 44.8, 48.0], abs=1e-3)
    assert result.detections[:, :4].sort(0).values.flatten().tolist() == pytest.approx(
        result.labels[:, 1:].sort(0).values.flatten().tolist(), abs=1e-3
    )
    assert float(network[0][:, :4].max()) < SIZE


def test_large_batches_run_in_chunks_on_the_cpu():
    model, seen = Oracle(), []
    criterion = recording_criterion(seen)
    run(model, [make_batch(CPU_CHUNK + 3)], criterion=criterion)
    assert model.calls == [CPU_CHUNK, 3]
    assert seen == [(2, CPU_CHUNK + 3, 2 * (CPU_CHUNK + 3))]


def recording_criterion(seen):
    def criterion(raw, targets):
        seen.append((len(raw), len(raw[0]), len(targets)))
        box = torch.tensor(float(len(seen)))
        return LossParts(total=box, box=box, obj=torch.tensor(2.0), cls=torch.tensor(0.5))

    return criterion


def test_losses_are_means_over_batches():
    assert run(Oracle(), [make_batch(1)] * 3, criterion=recording_criterion([])).losses == (2.0, 2.0, 0.5)


def test_training_mode_comes_back():
    model = Oracle()
    model.train()
    run(model, [make_batch(1)])
    assert model.training


def test_model_may_be_any_callable():
    assert run(lambda images: Oracle().eval()(images), [make_batch(1)]).map == pytest.approx(0.995)


def test_no_labels_no_images_no_detections(caplog):
    empty = make_batch(2)
    empty.targets = torch.zeros(0, 6)
    metrics = run(Oracle(), [empty])
    assert metrics.row() == [0] * 7 and metrics.images == 2
    assert "no labels" in caplog.text
    assert run(Oracle(), []).images == 0
    silent = run(lambda images: (torch.zeros(len(images), 2, 7), None), [make_batch(1)])
    assert (silent.map, silent.labels, silent.confusion[2].sum()) == (0, 2, 2)


def test_bad_threshold_before_the_model_runs():
    with pytest.raises(ConfigError, match="--iou-thres"):
        run(Oracle(), [make_batch(1)], iou_thres=60)


def test_hybrid_labels_join_nms():
    blind = lambda images: (torch.zeros(len(images), 2, 7), None)  # noqa: E731
    assert run(blind, [make_batch(2)], hybrid=True).map == pytest.approx(0.995)


def test_files_of_an_evaluation(tmp_path):
    labels = LabelWriter(tmp_path / "labels", with_confidence=True)
    coco = CocoCollector(NAMES, (0, 1))
    batch_pictures = BatchPictures(tmp_path, NAMES, batches=1)
    observers = [labels, coco, batch_pictures]
    metrics = run(Oracle(), [make_batch(2), make_batch(2, 2)], observers=observers)
    save_curves(metrics, NAMES, tmp_path)
    batch_pictures.close()
    coco.save(tmp_path / "predictions.json")

    lines = sorted((tmp_path / "labels/0.txt").read_text().splitlines())
    assert [float(x) for x in lines[0].split()] == pytest.approx([0, 0.25, 0.366667, 0.2, 0.266667, 0.9], abs=1e-5)
    assert labels.files == 4
    saved = json.loads((tmp_path / "predictions.json").read_text())
    assert len(saved) == 8 and saved[0].keys() == {"image_id", "category_id", "bbox", "score"}
    assert {entry["image_id"] for entry in saved} == {0, 1, 2, 3}
    coco.begin()
    assert coco.stats()["AP"] == pytest.approx(1.0)
    pictures = {f"{name}.png" for name in ("PR_curve", "F1_curve", "P_curve", "R_curve", "confusion_matrix")}
    assert pictures | {"val_batch0_labels.jpg", "val_batch0_pred.jpg"} <= {f.name for f in tmp_path.iterdir()}


def test_a_picture_that_cannot_be_written_is_told_when_it_is_waited_for(tmp_path):
    pictures = BatchPictures(tmp_path / "missing", NAMES)
    assert run(Oracle(), [make_batch(1)], observers=[pictures]).map50 == pytest.approx(0.995)
    with pytest.raises(ResourceError, match="val_batch0_labels.jpg"):
        pictures.close()


def test_a_picture_that_cannot_be_written_ends_a_long_pass(tmp_path):
    pictures, oracle = BatchPictures(tmp_path / "missing", NAMES), Oracle()

    def batches():
        for number in range(1000):
            yield make_batch(1, number)
            if pictures._background._pending:
                pictures._background._pending[0].result()

    with pytest.raises(ResourceError, match="val_batch0_labels.jpg"):
        run(oracle, batches(), observers=[pictures])
    assert len(oracle.calls) < 20


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_on_a_gpu_it_gives_the_same_and_times_each_stage(dtype):
    device = torch.device("cuda:0")
    oracle = Oracle()
    metrics = evaluate(
        lambda images: (oracle.eval()(images)[0].to(device), None),
        [make_batch(3)] * 2,
        device=device,
        names=NAMES,
        amp_dtype=dtype,
        show_progress=False,
    )
    assert metrics.map == pytest.approx(0.995)
    assert all(ms > 0 for ms in metrics.speed.values())


@pytest.mark.gpu
@pytest.mark.parametrize("batches", [1, 2, 12])
def test_beside_the_next_batch_the_same_is_found(batches):
    """The model and NMS as graphs, whose outputs the next batch writes over; the last batch is smaller."""
    device, generator = torch.device("cuda:0"), torch.Generator().manual_seed(0)
    table = torch.rand(batches, 3000, 7, generator=generator)
    table[..., :4] *= SIZE
    table = table.to(device)

    def model(images):
        return table[(images[:, 0, 0, 0] * 255).round().long()], None

    def loaded():
        for number in range(batches):
            batch = make_batch(2 if number == batches - 1 else 3, 3 * number)
            batch.images[:] = number
            yield batch

    found = {}
    for overlap in (False, True):
        see = lambda batch, detections, results: found.setdefault(overlap, []).extend(detections)  # noqa: E731, B023
        settings = dict(device=device, names=NAMES, overlap=overlap, observers=[see], show_progress=False)
        evaluate(CudaGraphs(model) if overlap else model, loaded(), **settings)
    assert len(found[True]) == len(found[False]) == 3 * batches - 1 and all(map(len, found[True]))
    assert all(torch.equal(a, b) for a, b in zip(found[True], found[False]))


def test_label_files_of_an_earlier_run_do_not_stay(tmp_path):
    """--exist-ok: a file for an image in which nothing is found any more would be read as a detection."""
    (tmp_path / "labels").mkdir()
    stale = tmp_path / "labels" / f"{Path(make_batch(1).paths[0]).stem}.txt"
    stale.write_text("0 0.5 0.5 0.1 0.1\n")
    run(Oracle(), [make_batch(1)], conf_thres=0.999, observers=[LabelWriter(tmp_path / "labels", False)])
    assert not stale.exists()
