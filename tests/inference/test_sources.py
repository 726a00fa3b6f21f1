"""What --source accepts, in which order it comes, and what is said about the rest."""

from __future__ import annotations

import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest

from tests.inference.conftest import picture, write_png, write_video
from utils.errors import SourceError
from utils.frames import suffix_of
from utils.sources import FileSource, open_source
from utils.streams import StreamSource, file_name, hide_password


def names_of(source: object) -> list[str]:
    return [frame.name for frame in source]


def test_a_picture_comes_as_rgb_bytes(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", seed=3)
    (frame,) = open_source(str(path))
    assert frame.image.dtype == np.uint8 and frame.image.flags["C_CONTIGUOUS"]
    assert np.array_equal(frame.image, picture(seed=3))
    assert (frame.kind, frame.item, frame.items, frame.name) == ("image", 1, 1, "a.png")


def test_a_folder_is_sorted_flat_and_pictures_come_before_videos(tmp_path: Path) -> None:
    for name in ("c.PNG", "a.png", "deep/b.png"):
        write_png(tmp_path / name)
    write_video(tmp_path / "b.mp4", frames=1)
    (tmp_path / "notes.csv").write_text("no picture")
    assert names_of(open_source(str(tmp_path))) == ["a.png", "c.PNG", "b.mp4"]


def test_globs_search_subfolders_with_two_stars(tmp_path: Path) -> None:
    for name in ("a.png", "deep/b.png", "deep/er/c.png"):
        write_png(tmp_path / name)
    assert names_of(open_source(f"{tmp_path}/*.png")) == ["a.png"]
    assert sorted(names_of(open_source(f"{tmp_path}/**/*.png"))) == ["a.png", "b.png", "c.png"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a[1].png")
    assert names_of(open_source(str(path))) == ["a[1].png"]


def test_several_sources_are_one_run(tmp_path: Path) -> None:
    paths = [str(write_png(tmp_path / name)) for name in ("b.png", "a.png")]
    assert names_of(open_source(paths)) == ["b.png", "a.png"]


def test_a_list_has_a_source_a_line(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png")
    write_png(tmp_path / "folder" / "b.png")
    (tmp_path / "list.txt").write_text(f"# comment\n\na.png\n{tmp_path}/folder\n")
    assert names_of(open_source(str(tmp_path / "list.txt"))) == ["a.png", "b.png"]


def test_a_missing_line_of_a_list_is_counted_and_the_others_are_read(tmp_path: Path, log) -> None:
    write_png(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("gone.png\na.png\n")
    source = open_source(str(tmp_path / "list.txt"))
    assert names_of(source) == ["a.png"]
    assert source.failed == ["gone.png"] and "gone.png: no such file" in log.text


def test_video_frames_are_numbered(tmp_path: Path) -> None:
    frames = list(open_source(str(write_video(tmp_path / "clip.mp4"))))
    assert [(f.index, f.total, f.fps, f.kind) for f in frames] == [(i, 5, 10.0, "video") for i in range(1, 6)]
    assert np.allclose([f.image.mean() for f in frames], [0, 40, 80, 120, 160], atol=6)


def test_vid_stride_takes_every_nth_frame_and_keeps_the_duration(tmp_path: Path) -> None:
    frames = list(open_source(str(write_video(tmp_path / "clip.mp4")), vid_stride=2))
    assert [(f.index, f.fps) for f in frames] == [(2, 5.0), (4, 5.0)]
    assert np.allclose([f.image.mean() for f in frames], [40, 120], atol=6)


def test_unreadable_files_are_one_warning_each_and_the_rest_is_read(tmp_path: Path, log) -> None:
    write_png(tmp_path / "b.png")
    (tmp_path / "a.png").write_bytes(b"no picture at all")
    (tmp_path / "c.mp4").write_bytes(b"no video at all")
    source = open_source(str(tmp_path))
    assert names_of(source) == ["b.png"]
    assert [Path(p).name for p in source.failed] == ["a.png", "c.mp4"]
    assert len(log.messages) == 2 and all("\n" not in m for m in log.messages)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("phto.png", "did you mean 'photo.png'"),
        ("nowhere/a.png", "there is no folder"),
        ("*.jpg", "no picture or video matches"),
        ("table.csv", "neither a picture nor a video"),
        ("empty", "holds no picture or video"),
        ("only_deep", r"use '.*only_deep/\*\*/\*.jpg'"),
        ("empty.txt", "the list is empty"),
        ("nested.txt", "nested.txt:1: .*a list inside a list"),
        ("wrong.txt", "wrong.txt:2: .*no such file or folder"),
    ],
)
def test_wrong_sources_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    write_png(tmp_path / "photo.png")
    write_png(tmp_path / "only_deep" / "deep" / "a.png")
    (tmp_path / "table.csv").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n#\n")
    (tmp_path / "nested.txt").write_text("empty.txt\n")
    (tmp_path / "wrong.txt").write_text("photo.png\nno/such/folder\n")
    with pytest.raises(SourceError, match=message) as caught:
        open_source(str(tmp_path / text))
    assert "\n" not in str(caught.value)


def test_pictures_are_not_downloaded() -> None:
    with pytest.raises(SourceError, match="not downloaded.*curl"):
        open_source("https://example.invalid/a.JPG?size=3")


def test_streams_and_files_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be mixed"):
        open_source([str(write_png(tmp_path / "a.png")), "0"])


@pytest.mark.parametrize("words", ["screen left", "screen 0 1 2", "screen 1.5"])
def test_wrong_screen_words(words: str) -> None:
    with pytest.raises(SourceError, match="screen \\[number\\] \\[left top width height\\]"):
        open_source(words)


def test_suffixes_of_addresses_leave_the_query_out() -> None:
    assert suffix_of("http://h/a.MP4?x=.jpg#t") == ".mp4"
    assert suffix_of("a?.jpg") == ".jpg"


class FakeCapture:
    """A camera: ``script`` says for each opening how many frames it gives (0: it does not open)."""

    def __init__(self, script: list[int]) -> None:
        self.left = script.pop(0) if script else 0
        self.opened = self.left > 0
        self.released = False
        FakeCapture.made.append(self)

    made: list[FakeCapture] = []

    def isOpened(self) -> bool:
        return self.opened

    def get(self, _what: int) -> float:
        return 0.0

    def grab(self) -> bool:
        self.left -= 1
        return self.left >= 0

    def retrieve(self) -> tuple[bool, np.ndarray]:
        return True, np.full((4, 6, 3), (10, 20, 30), np.uint8)

    def release(self) -> None:
        self.released = True


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch):
    made: list[FakeCapture] = []
    monkeypatch.setattr(FakeCapture, "made", made)

    def build(script: list[int], patience: float = 0.2, addresses: tuple[str, ...] = ("0",)) -> StreamSource:
        return StreamSource(addresses, 1, patience, lambda _target: FakeCapture(script), first_delay=0.01)

    return build


def test_a_stream_that_does_not_open_is_an_error_at_once(camera) -> None:
    with pytest.raises(SourceError, match="0: cannot be opened; check that a camera"):
        camera([])
    with pytest.raises(SourceError, match="network"):
        camera([1000000, 0], addresses=("rtsp://a", "rtsp://b"))
    assert all(capture.released for capture in FakeCapture.made)


def test_a_lost_stream_is_reopened_and_given_up_in_the_end(camera, log) -> None:
    with camera([1, 0, 2]) as source:
        frames = list(source)
    assert frames and all(np.array_equal(f.image[0, 0], [30, 20, 10]) for f in frames)  # RGB, and never black
    assert frames[-1].index == 3 and frames[-1].fps == 30 and frames[-1].kind == "stream"
    assert source.failed == ["0"]
    assert "reconnected" in log.text and "given up" in log.text
    assert all(capture.released for capture in FakeCapture.made)


def test_leaving_the_loop_stops_the_threads(camera) -> None:
    before = threading.active_count()
    with camera([10**9, 10**9], addresses=("rtsp://a/1", "rtsp://b/2")) as source:
        seen = set()
        for frame in source:
            seen.add(frame.name)
            if len(seen) == 2:
                break
    assert seen == {"a_1.mp4", "b_2.mp4"}
    assert threading.active_count() == before and not source.failed


def test_passwords_are_neither_shown_nor_written() -> None:
    assert hide_password("rtsp://me:secret@host:554/live?x=1") == "rtsp://me@host:554/live?x=1"
    assert hide_password("rtsp://host/a@b") == "rtsp://host/a@b"
    assert file_name("rtsp://me@host:554/../live") == "me_host_554_live.mp4"
    assert file_name("0") == "webcam0.mp4"


def test_files_can_be_read_twice(tmp_path: Path) -> None:
    source = FileSource([str(write_png(tmp_path / "a.png"))])
    assert len(list(source)) == len(list(source)) == 1


def test_screenshots_come_from_the_area_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Grabber:
        monitors = [dict(left=0, top=0, width=300, height=100), dict(left=100, top=0, width=200, height=100)]

        def grab(self, area: dict) -> np.ndarray:
            return np.full((area["height"], area["width"], 4), (1, area["left"], 3, 255), np.uint8)  # BGRA

        def close(self) -> None: ...

    fake = types.SimpleNamespace(mss=Grabber, exception=types.SimpleNamespace(ScreenShotError=OSError))
    monkeypatch.setitem(sys.modules, "mss", fake)
    with open_source(["screen", "1", "5", "6", "40", "30"]) as source:
        frame = next(iter(source))
    assert frame.image.shape == (30, 40, 3) and frame.image[0, 0].tolist() == [3, 105, 1]
    assert (frame.name, frame.kind) == ("screen1.mp4", "stream")
    with pytest.raises(SourceError, match="there are screens 0 \\(all\\) to 1"):
        open_source("screen 2")


def test_without_mss_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mss", None)
    with pytest.raises(SourceError, match="pip install mss"):
        open_source("screen")
