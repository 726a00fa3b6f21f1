"""The loop and its files, with a model that finds known boxes."""

from __future__ import annotations

import csv
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from engine.feature_maps import feature_grid, record_features, save_features
from engine.predictor import Summary, closing_lines, predict
from engine.read_ahead import read_ahead
from engine.window import Window
from engine.writers import OutputOptions, ResultWriter
from models.api import Detector
from tests.inference.conftest import BOXES, FakeModel, picture, write_png, write_video
from utils.crops import crop_box
from utils.errors import ConfigError, ResourceError
from utils.frames import Frame, Source
from utils.images import read_image
from utils.sources import open_source

LABELS = (
    "0 0.15625 0.208333 0.078125 0.104167\n1 0.703125 0.520833 0.09375 0.0833333\n1 0.375 0.333333 0.3125 0.208333\n"
)
"""BOXES over 128 x 96 pixels, least confident first."""
BOX_CORNERS = (28, 22, 68, 42)


def go(detector: Detector, source: Source | str, folder: Path, imgsz: int = 128, **options) -> Summary:
    source = open_source(source) if isinstance(source, str) else source
    folder.mkdir(exist_ok=True, parents=True)
    with ResultWriter(folder, OutputOptions(**options), detector.names) as writer:
        summary = predict(detector, source, writer, (imgsz, imgsz))
    closing_lines(summary, writer, writer.options.any_file)
    return summary


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_console_lines(detector: Detector, tmp_path: Path, log) -> None:
    path = write_png(tmp_path / "in" / "a.png")
    go(detector, str(tmp_path / "in"), tmp_path / "out", text=True)
    first, speed, saved, labels = log.messages
    assert first.startswith(f"image 1/1 {path}: 96x128 1 red, 2 greens, ") and first.endswith("ms")
    assert speed.startswith("Speed: ") and speed.endswith("NMS per image at shape (1, 3, 96, 128)")
    assert saved == f"Results saved to {tmp_path}/out" and labels == f"1 label saved to {tmp_path}/out/labels"


def test_console_line_without_detections_and_of_videos(tmp_path: Path, log) -> None:
    clip = write_video(tmp_path / "clip.mp4", frames=2)
    go(Detector(FakeModel([]), torch.device("cpu")), str(clip), tmp_path / "out", pictures=False)
    assert f"video 1/1 (2/2) {clip}: 96x128 (no detections), " in log.text
    assert "Results saved" not in log.text


def test_line_ends_in_names_stay_in_their_line(tmp_path: Path, log) -> None:
    detector = Detector(FakeModel(BOXES[:1], {0: "a", 1: "b\n\x1b[2Jc"}), torch.device("cpu"))
    go(detector, str(write_png(tmp_path / "x\ny.png")), tmp_path / "out")
    assert "x\\ny.png: 96x128 1 b\\n\\x1b[2Jc, " in log.messages[0]


def test_the_network_sees_the_smallest_rectangle(tmp_path: Path) -> None:
    model = FakeModel([])
    detector = Detector(model, torch.device("cpu"))
    go(detector, str(write_png(tmp_path / "a.png", height=90, width=256)), tmp_path / "out", imgsz=100)
    assert model.seen == [(1, 3, 64, 128)]


def test_boxes_come_back_in_pixels_of_the_picture(tmp_path: Path) -> None:
    """A 192 x 256 picture at size 128 is halved: boxes double and are rounded to whole pixels."""
    found = []
    detector = Detector(FakeModel([(48.3, 32, 40, 20, 0.9, 1)]), torch.device("cpu"))
    source = open_source(str(write_png(tmp_path / "a.png", height=192, width=256)))
    with ResultWriter(tmp_path, OutputOptions(pictures=False), detector.names) as writer:
        predict(detector, source, writer, (128, 128), on_frame=lambda _frame, rows: found.append(rows))
    assert found[0].tolist() == [[57, 44, 137, 84, pytest.approx(0.9), 1]]


def test_label_files_exactly(detector: Detector, tmp_path: Path) -> None:
    source = str(write_png(tmp_path / "a.png"))
    go(detector, source, tmp_path / "out", text=True)
    assert (tmp_path / "out/labels/a.txt").read_text() == LABELS
    go(detector, source, tmp_path / "out", text=True)  # --exist-ok: replaced, not appended to
    assert (tmp_path / "out/labels/a.txt").read_text() == LABELS
    go(detector, source, tmp_path / "out", text=True, text_confidence=True, corners=True)
    last = (tmp_path / "out/labels/a.txt").read_text().splitlines()[-1]
    assert last == "1 0.21875 0.229167 0.53125 0.4375 0.9"


def test_no_detections_leave_no_label_file_even_an_old_one(detector: Detector, tmp_path: Path) -> None:
    source = str(write_png(tmp_path / "a.png"))
    go(detector, source, tmp_path / "out", text=True)
    go(Detector(FakeModel([]), torch.device("cpu")), source, tmp_path / "out", text=True)
    assert files(tmp_path / "out") == ["a.png"]


def test_pictures_with_the_same_stem_do_not_replace_each_other(detector: Detector, tmp_path: Path) -> None:
    for name in ("1/a.png", "2/a.png", "3/A.bmp", "4/a-2.png"):
        write_png(tmp_path / "in" / name)
    go(detector, f"{tmp_path}/in/**/*.*", tmp_path / "out", text=True)
    stems = ["A-3", "a", "a-2", "a-2-2"]
    expected = [*(f"labels/{s}.txt" for s in stems), "A-3.bmp", "a.png", "a-2.png", "a-2-2.png"]
    assert files(tmp_path / "out") == sorted(expected)


def test_a_picture_and_a_video_frame_do_not_share_a_label_file(detector: Detector, tmp_path: Path) -> None:
    write_png(tmp_path / "in" / "clip_1.png")
    write_video(tmp_path / "in" / "clip.mp4", frames=2)
    go(detector, str(tmp_path / "in"), tmp_path / "out", text=True, pictures=False)
    assert files(tmp_path / "out") == ["labels/clip-video_1.txt", "labels/clip-video_2.txt", "labels/clip_1.txt"]


def test_the_drawn_picture_differs_only_around_the_boxes(detector: Detector, tmp_path: Path) -> None:
    go(detector, str(write_png(tmp_path / "a.png")), tmp_path / "out", draw_labels=False, thickness=1)
    changed = (read_image(tmp_path / "out/a.png") != picture()).any(2)
    assert changed[22, 30:60].all() and changed[42, 30:60].all()  # top and bottom edge of the first box
    assert not changed[60:].any() and not changed[25:40, 31:66].any()


def test_videos_keep_size_length_and_speed(detector: Detector, tmp_path: Path) -> None:
    go(detector, str(write_video(tmp_path / "clip.avi.mp4")), tmp_path / "out", text=True)
    capture = cv2.VideoCapture(str(tmp_path / "out/clip.avi.mp4"))
    size = capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
    assert size == (128, 96) and capture.get(cv2.CAP_PROP_FPS) == 10 and capture.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    assert sorted(p.name for p in (tmp_path / "out/labels").iterdir()) == [f"clip.avi_{i}.txt" for i in range(1, 6)]


class Scripted(Source):
    """Yields the frames given; an exception class among them is raised."""

    def __init__(self, *script) -> None:
        super().__init__()
        self.script = script

    def __iter__(self):
        for step in self.script:
            if isinstance(step, type):
                raise step
            yield step


def stream_frame(index: int, height: int = 96) -> Frame:
    return Frame(picture(height), "rtsp://h/live", "h_live.mp4", "stream", 1, 1, index, 0, 10.0)


def test_ctrl_c_leaves_whole_files(detector: Detector, tmp_path: Path) -> None:
    source = Scripted(stream_frame(1), stream_frame(2), KeyboardInterrupt)
    summary = go(detector, source, tmp_path, table=True)
    assert summary.interrupted and summary.frames == 2
    assert cv2.VideoCapture(str(tmp_path / "h_live.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 2
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 1 + 2 * 3


def test_batches_change_nothing(detector: Detector, tmp_path: Path) -> None:
    """Pictures of two sizes and a video, one at a time and in batches: the same files, byte for byte, in full batches
    of one network size."""
    for number in range(7):
        write_png(tmp_path / "in" / f"{number}.png", height=96 if number < 4 else 64)
    write_video(tmp_path / "in" / "clip.mp4", frames=5)
    for name, size in (("one", 1), ("three", 3)):
        (tmp_path / name).mkdir()
        source = open_source(str(tmp_path / "in"))
        with ResultWriter(tmp_path / name, OutputOptions(text=True, table=True), detector.names) as writer:
            summary = predict(detector, source, writer, (128, 128), batch_size=size)
        assert summary.frames == 12
    assert files(tmp_path / "one") == files(tmp_path / "three")
    for file in files(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "three" / file).read_bytes(), file
    assert [shape[0] for shape in detector.model.seen[12:]] == [3, 1, 3, 3, 2]


def test_a_source_that_fails_is_heard_after_its_frames(detector: Detector, tmp_path: Path) -> None:
    with ResultWriter(tmp_path, OutputOptions(), detector.names) as writer, pytest.raises(OSError):
        predict(detector, Scripted(stream_frame(1), stream_frame(2), OSError), writer, (128, 128))
    assert cv2.VideoCapture(str(tmp_path / "h_live.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 2


def test_leaving_the_loop_ends_the_reading_thread() -> None:
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield taken[-1]

    reader = read_ahead(endless(), 3)
    assert [next(reader) for _ in range(4)] == [0, 1, 2, 3]
    reader.close()
    deadline = time.monotonic() + 10
    while any(thread.name == "read ahead" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.name == "read ahead" for thread in threading.enumerate()) and len(taken) <= 9


def test_a_stream_that_changes_its_size_goes_on_in_a_second_file(detector: Detector, tmp_path: Path) -> None:
    go(detector, Scripted(stream_frame(1), stream_frame(2, 64), stream_frame(3, 64)), tmp_path)
    counts = [cv2.VideoCapture(str(tmp_path / n)).get(7) for n in ("h_live.mp4", "h_live_part2.mp4")]
    assert counts == [1, 2]


def test_a_video_that_cannot_be_written_is_said(detector: Detector, tmp_path: Path) -> None:
    writer = ResultWriter(tmp_path, OutputOptions(), detector.names)
    tmp_path = tmp_path / "gone"
    writer.folder = tmp_path
    writer.write(stream_frame(1), torch.zeros(0, 6), picture())
    with pytest.raises(ResourceError, match="h_live.mp4: a 128x96 video cannot be written"):
        writer.close()


def test_table(tmp_path: Path) -> None:
    detector = Detector(FakeModel(BOXES, {0: "=cmd()", 1: 'a, "b"'}), torch.device("cpu"))
    go(detector, str(write_png(tmp_path / "+a.png")), tmp_path / "out", table=True, pictures=False)
    with open(tmp_path / "out/predictions.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["Image Name", "Prediction", "Confidence"],
        ["'+a.png", "'=cmd()", "0.50"],
        ["'+a.png", 'a, "b"', "0.75"],
        ["'+a.png", 'a, "b"', "0.90"],
    ]


def test_crops_are_the_boxes_with_a_margin(detector: Detector, tmp_path: Path) -> None:
    go(detector, str(write_png(tmp_path / "a.png")), tmp_path / "out", crops=True, pictures=False)
    assert files(tmp_path / "out") == ["crops/green/a-2.jpg", "crops/green/a.jpg", "crops/red/a.jpg"]
    assert read_image(tmp_path / "out/crops/red/a.jpg").shape == (21, 21, 3)  # 20 +- 10.1, cut to whole pixels
    assert read_image(tmp_path / "out/crops/green/a-2.jpg").shape == (31, 51, 3)
    assert np.array_equal(crop_box(picture(), BOX_CORNERS), picture()[16:47, 22:73])


def test_crops_at_the_border_and_of_nothing() -> None:
    assert crop_box(picture(), (120, 90, 128, 96)).shape == (12, 14, 3)
    assert crop_box(picture(), (500, 500, 500, 500)).shape == (1, 1, 3)
    assert crop_box(picture(), (-50, -50, -40, -40)).shape == (1, 1, 3)


def test_hostile_class_names_stay_inside_the_run_folder(tmp_path: Path) -> None:
    names = {0: "../../evil", 1: "/etc/passwd", 2: "..", 3: "a\0b\n", 4: "CON", 5: "x" * 500, 6: "Cat", 7: "cat"}
    boxes = [(10 + 12 * i, 20, 8, 8, 0.9, i) for i in names]
    folder = tmp_path / "deep" / "er" / "out"
    go(Detector(FakeModel(boxes, names), torch.device("cpu")), str(write_png(tmp_path / "a.png")), folder, crops=True)
    crops = sorted(p.name for p in (folder / "crops").iterdir())
    assert crops == sorted(["_.._evil", "_etc_passwd", "class2", "a b", "class4", "x" * 120, "Cat", "cat-2"])
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "deep"}


def test_classes_out_of_range_name_the_range() -> None:
    with pytest.raises(ConfigError, match="--classes 3: this model has classes 0 to 2"):
        Detector(FakeModel([]), torch.device("cpu"), classes=[0, 3])


def test_classes_filter(tmp_path: Path, log) -> None:
    detector = Detector(FakeModel(BOXES), torch.device("cpu"), classes=[0])
    go(detector, str(write_png(tmp_path / "a.png")), tmp_path / "out")
    assert ": 96x128 1 red, " in log.messages[0]


def test_windows_without_a_display_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(ConfigError, match="--view-img: there is no display"):
        Window()


class Layers(FakeModel):
    """A model with two layers to look into."""

    def __init__(self) -> None:
        super().__init__([])
        self.model = torch.nn.Sequential(torch.nn.Conv2d(3, 40, 3, 2, 1), torch.nn.Flatten())

    def forward(self, images: torch.Tensor):
        self.model(images)
        return super().forward(images)


def test_feature_maps_of_each_picture_have_a_folder(tmp_path: Path) -> None:
    write_png(tmp_path / "in/a.png")
    write_video(tmp_path / "in/a.mp4", frames=3)
    detector = Detector(Layers(), torch.device("cpu"))
    source = open_source(str(tmp_path / "in"))
    with ResultWriter(tmp_path / "out", OutputOptions(pictures=False), detector.names) as writer:
        predict(detector, source, writer, (128, 128), feature_folder=tmp_path / "out")
    expected = [f"{d}/stage0_Conv2d_features.{s}" for d in ("a-2", "a") for s in ("npy", "png")]
    assert files(tmp_path / "out") == expected
    assert np.load(tmp_path / "out" / expected[0]).shape == (40, 48, 64)
    assert read_image(tmp_path / "out" / expected[1]).shape == (4 * 50 - 2, 8 * 66 - 2, 3)


def test_feature_maps_need_one_model(detector: Detector, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--visualize"), record_features(detector.model):
        pass
    save_features({"x": np.full((3, 2, 2), np.nan, np.float32)}, tmp_path)
    assert feature_grid(np.zeros((1, 100, 60))).shape == (100, 60, 3)


def test_pictures_of_one_row_or_column(detector: Detector, tmp_path: Path) -> None:
    write_png(tmp_path / "in/row.png", height=1, width=3000)
    write_png(tmp_path / "in/column.png", height=3000, width=1)
    assert go(detector, str(tmp_path / "in"), tmp_path / "out").frames == 2
