"""Pictures: drawn where they should be, on any size, and never by changing the input."""

import cv2
import numpy as np
import pytest
import torch

from utils import curves, plots
from utils.errors import ResourceError
from utils.plots import PALETTE, batch_tiles, class_colour, draw_detections, plot_batch, write_image


def grey(height, width):
    return np.full((height, width, 3), 120, np.uint8)


def test_colours_are_stable():
    assert len(PALETTE) == 20 and class_colour(0) == (255, 56, 56) == class_colour(20)


@pytest.mark.parametrize("size", [(1, 1), (20, 9), (64, 96), (480, 640), (1200, 3000)])
def test_any_picture_size_and_any_box(size):
    image = grey(*size)
    boxes = [[0, 0, size[1], size[0]], [-1e9, -5, 1e9, 5], [size[1] - 1, 0, size[1], 9], [0, np.nan, 3, np.inf]]
    out = draw_detections(image, np.array(boxes), ["a very long name 0.99"] * 4, [class_colour(i) for i in range(4)])
    assert out.shape == image.shape and out.dtype == np.uint8
    assert (image == 120).all(), "the input stays as it was"
    assert (out != 120).any()


def test_label_stays_inside_at_every_edge():
    for box in ([0, 0, 30, 30], [170, 170, 199, 199]):
        out = draw_detections(grey(200, 200), np.array([box]), ["name 0.50"], [(255, 0, 0)])
        plain = draw_detections(grey(200, 200), np.array([box]), [""], [(255, 0, 0)])
        changed = np.argwhere((out != plain).any(2))
        assert np.ptp(changed[:, 1]) > 40, "the whole text is there"


def test_channel_order():
    box, colour = np.array([[10, 10, 50, 50]]), (250, 10, 20)
    assert draw_detections(grey(60, 60), box, [""], [colour])[10, 30].tolist() == [250, 10, 20]
    assert draw_detections(grey(60, 60), box, [""], [colour], bgr=True)[10, 30].tolist() == [20, 10, 250]


def test_chinese_japanese_and_korean_names_are_drawn():
    """Each letter as it is, not as the box that stands for a letter that a font has not."""
    box = np.array([[20, 60, 180, 150]])
    texts = ("红细胞", "血小板", "白血球", "さくら", "적혈구", "\U000e0000" * 3)
    drawn = {text: draw_detections(grey(200, 200), box, [text], [(0, 0, 0)]) for text in texts}
    assert len({picture.tobytes() for picture in drawn.values()}) == len(texts)
    boxes = plots._text_mask("\U000e0000" * 3, 0.4)
    for text in texts[:-1]:
        mask = plots._text_mask(text, 0.4)
        thirds = [part.tobytes() for part in np.array_split(mask[:, : mask.shape[1] // 3 * 3], 3, axis=1)]
        assert len(set(thirds)) == 3 and mask.any() and not np.array_equal(mask, boxes)


def test_names_beyond_ascii_are_drawn_not_questioned():
    box = np.array([[20, 60, 180, 180]])
    draw = [draw_detections(grey(200, 200), box, [text], [(0, 0, 0)]) for text in ("größe", "gröze", "????")]
    assert (draw[0] != draw[1]).any() and (draw[0] != draw[2]).any()


def test_batches_of_targets_and_of_detections(tmp_path):
    images = torch.full((18, 3, 48, 64), 120, dtype=torch.uint8)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.5, 0.5], [17, 0, 0.5, 0.5, 0.5, 0.5]])
    paths, names = [f"{i}.jpg" for i in range(18)], {0: "a", 1: "b"}
    plot_batch(images, targets, paths, names, tmp_path / "t.jpg")
    assert cv2.imread(str(tmp_path / "t.jpg")).shape == (4 * 48, 4 * 64, 3)
    detections = [torch.tensor([[5.0, 5, 40, 40, 0.9, 1], [0, 0, 9, 9, 0.1, 0]]), torch.zeros(0, 6)]
    plot_batch(images[:2], detections, paths, names, tmp_path / "d.png")
    assert cv2.imread(str(tmp_path / "d.png")).shape == (48, 128, 3)
    again = plot_batch(images, targets, paths, names, tmp_path / "again.png", batch_tiles(images))
    assert (again == plot_batch(images, targets, paths, names, tmp_path / "t.png")).all()  # tiles are left as they were
    large = torch.zeros(4, 3, 1280, 1280, dtype=torch.uint8)
    plot_batch(large, torch.zeros(0, 6), paths, names, tmp_path / "l.jpg")
    assert max(cv2.imread(str(tmp_path / "l.jpg")).shape) <= 1920


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(ResourceError, match="cannot be written"):
        write_image(tmp_path / "no-such-folder" / "x.jpg", grey(4, 4))
    figure, _ = curves.new_figure()
    with pytest.raises(ResourceError, match="cannot be written"):
        curves.save_figure(figure, tmp_path / "no-such-folder" / "x.png")


@pytest.mark.parametrize("classes", [0, 1, 25])
def test_curves_of_any_number_of_classes(tmp_path, classes):
    axis, values = np.linspace(0, 1, 50), np.random.default_rng(0).uniform(size=(classes, 50))
    names = [f"c{i}" for i in range(classes)]
    curves.plot_pr_curve(axis, values, values[:, 0], names, tmp_path / "pr.png")
    curves.plot_confidence_curve(axis, values, names, tmp_path / "f1.png", "F1")
    assert {f.name for f in tmp_path.iterdir()} == {"pr.png", "f1.png"}


def test_diagrams_of_a_run(tmp_path):
    curves.plot_confusion_matrix(np.diag([3.0, 0, 2]), ["a", "b"], tmp_path / "confusion.png")
    curves.plot_results({"epoch": [0, 1, 2, 3], "val/box_loss": [4, 3, float("nan"), 1]}, tmp_path / "results.png")
    curves.plot_labels(np.array([[0, 0.5, 0.5, 0.2, 0.1]]), {0: "a", 1: "b"}, tmp_path / "labels.png")
    curves.plot_labels(np.zeros((0, 5)), {0: "a"}, tmp_path / "none.png")
    curves.plot_study({"m": np.array([[320, 0.5, 0.3, 2], [640, 0.6, 0.4, 5]])}, tmp_path / "study.png")
    for file in tmp_path.iterdir():
        assert cv2.imread(str(file)) is not None
    assert len(list(tmp_path.iterdir())) == 5
