"""What detect.py reads: pictures, folders, globs, lists, videos; webcams, streams and the screen through utils.streams.

One iterator contract for all of them: ``with open_source(...) as source: for frame in source: ...`` yields
:class:`utils.frames.Frame`; ``source.failed`` afterwards names what could not be read. Nothing is downloaded.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2

from utils.console import LOGGER
from utils.errors import SourceError, UserError, did_you_mean
from utils.frames import URL_SCHEMES, Frame, Source, frames_per_second, is_url, next_frame, suffix_of
from utils.images import IMAGE_SUFFIXES, MAX_LIST_BYTES, VIDEO_SUFFIXES, read_image, walk
from utils.safe_names import printable
from utils.streams import ScreenSource, StreamSource


class FileSource(Source):
    """Pictures first, then videos, each in the order given.

    What cannot be read is one warning and one entry of ``failed``; the others are still read. ``vid_stride`` N
    yields every N-th frame of a video.
    """

    def __init__(self, files: Sequence[str], vid_stride: int = 1) -> None:
        super().__init__()
        videos = [f for f in files if suffix_of(f) in VIDEO_SUFFIXES]
        pictures = [f for f in files if suffix_of(f) not in VIDEO_SUFFIXES]
        self.files = pictures + videos
        self.vid_stride = vid_stride
        self._pictures = len(pictures)

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Frame]:
        for item, path in enumerate(self.files, 1):
            try:
                if item <= self._pictures:
                    yield Frame(read_image(path), path, Path(path).name, item=item, items=len(self))
                else:
                    yield from self._video(path, item)
            except UserError as error:
                self.failed.append(path)
                LOGGER.warning(_with_path(path, str(error)))

    def _video(self, path: str, item: int) -> Iterator[Frame]:
        if not path.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in path):
            raise SourceError(f"{printable(path)}: OpenCV opens no video whose name is not UTF-8; rename it")
        # from the root: FFmpeg takes the name concat:x.mp4 for an order
        capture = cv2.VideoCapture(path if is_url(path) else os.path.abspath(path))
        try:
            if not capture.isOpened():
                raise SourceError(f"{path}: cannot be opened as a video{_missing_or_damaged(path)}")
            fps = frames_per_second(capture) / self.vid_stride
            total = max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
            index = 0
            while (image := next_frame(capture, self.vid_stride)) is not None:
                index += self.vid_stride
                yield Frame(image, path, Path(path).name, "video", item, len(self), index, total, fps)
            if index == 0:
                raise SourceError(f"{path}: no frame could be decoded; {_why_no_frame(path)}")
        finally:
            capture.release()


def open_source(sources: str | Sequence[str], vid_stride: int = 1) -> Source:
    """Open what ``--source`` names: one text, or several when the shell has expanded a glob.

    file | folder (not its subfolders) | glob (``**`` searches subfolders) | list.txt of those, one a line |
    list.streams of addresses, one a line | 0 (webcam number) | rtsp://, http://, ... stream |
    screen [number] [left top width height].
    Raises SourceError, in one line, for what does not exist, is no picture or video, or cannot be opened.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    if vid_stride < 1:
        raise SourceError(f"--vid-stride {vid_stride}: expected 1 or more")
    sources = [text for text in sources if text.strip()]
    if not sources:
        raise SourceError("--source: nothing given; name a file, folder, glob, list.txt, stream, webcam or 'screen'")
    first = sources[0].split()
    if first[0].lower() == "screen" and not Path(sources[0]).exists():
        return ScreenSource(" ".join(sources).split()[1:])
    live = [text for text in sources if _is_live(text)]
    if not live:
        return FileSource([path for text in sources for path in list_files(text)], vid_stride)
    if len(live) < len(sources):
        raise SourceError(f"--source {live[0]}: streams and files cannot be mixed in one run")
    return StreamSource([address for text in live for address in _addresses(text)], vid_stride)


def _is_live(text: str) -> bool:
    if text.isdigit() or suffix_of(text) == ".streams":
        return True
    return is_url(text) and suffix_of(text) not in (IMAGE_SUFFIXES | VIDEO_SUFFIXES)


def _addresses(text: str) -> list[str]:
    if suffix_of(text) != ".streams" or is_url(text):
        return [text]
    return [_address(text, number, line) for number, line in _lines(text)]


def _address(file: str, number: int, line: str) -> str:
    """One line of a .streams file. OpenCV's backends would obey other words as well: pipelines that write files,
    ``concat:``, ``file:``."""
    if line.isdigit() or is_url(line):
        return line
    if os.path.isfile(line):
        return os.path.abspath(line)
    raise SourceError(
        f"{file}:{number}: {line[:200]}: expected an address ({' '.join(URL_SCHEMES)}), a webcam number or a video file"
    )


def list_files(text: str) -> list[str]:
    """The picture and video files that one ``--source`` text names, in order. Raises SourceError for none."""
    if is_url(text):
        if suffix_of(text) in VIDEO_SUFFIXES:
            return [text]
        raise SourceError(f"{text}: pictures are not downloaded; fetch it first (curl -O URL) and give the file")
    path = Path(os.path.expanduser(text))
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        if path.suffix.lower() == ".txt":
            return _in_list(path)
        if not _readable(path):
            raise SourceError(f"{text}: neither a picture nor a video (known: {_known_suffixes()})")
        return [str(path)]
    if glob.has_magic(text):
        found = sorted(p for p in set(_matches(str(path))) if _readable(Path(p)) and not os.path.isdir(p))
        if not found:
            raise SourceError(f"--source {text}: no picture or video matches this pattern")
        return found
    raise SourceError(_missing(text, path))


def _matches(pattern: str) -> Iterator[str]:
    """What a pattern matches; ``**`` is any number of folders, each of them once, however many links lead to it
    (glob's own ``**`` goes round a circle of links until the names are too long)."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    place = parts.index("**")
    tops, rest = os.sep.join([*parts[:place], ""]), parts[place + 1 :] or ["*"]
    for top in glob.iglob(tops) if tops else [os.curdir]:
        for folder, _ in walk(top):
            inside = "" if folder == os.curdir else glob.escape(folder.removeprefix(f"{os.curdir}{os.sep}"))
            yield from _matches(os.path.join(inside, *rest))


def _in_folder(folder: Path) -> list[str]:
    try:
        # a link to nowhere stays in, to be named when its turn comes
        found = sorted(str(p) for p in folder.iterdir() if _readable(p) and not p.is_dir())
    except OSError as error:
        raise SourceError(f"{folder}: cannot be read ({error.strerror})") from None
    if not found:
        deeper = any(p.is_dir() for p in folder.iterdir())
        hint = f"; subfolders are not searched, use '{folder}/**/*.jpg'" if deeper else ""
        raise SourceError(f"{folder}: holds no picture or video{hint} (known: {_known_suffixes()})")
    return found


def _in_list(path: Path) -> list[str]:
    """Lines of a .txt list; a relative one is looked for in the working folder, then beside the list. An entry that
    does not exist stays in: it is reported, and counted, when its turn comes."""
    found: list[str] = []
    for number, line in _lines(path):
        if suffix_of(line) == ".txt":
            raise SourceError(f"{path}:{number}: {line}: a list inside a list is not accepted")
        beside = path.parent / line
        entry = str(beside) if not Path(line).exists() and beside.exists() else line
        is_plain_file = _readable(Path(entry)) and not glob.has_magic(entry) and not is_url(entry)
        found += [entry] if is_plain_file and not Path(entry).is_dir() else _entry(path, number, entry)
    return found


def _entry(path: Path, number: int, entry: str) -> list[str]:
    try:
        return list_files(entry)
    except SourceError as error:
        raise SourceError(f"{path}:{number}: {error}") from None


def _lines(path: str | Path) -> list[tuple[int, str]]:
    try:
        size = os.path.getsize(path)
        if size > MAX_LIST_BYTES:
            raise SourceError(f"{path}: larger than {MAX_LIST_BYTES // 1_000_000} MB, not a list of sources")
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from None
    numbered = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1)]
    lines = [(n, line) for n, line in numbered if line and not line.startswith("#")]
    if not lines:
        raise SourceError(f"{path}: the list is empty; expected one source a line")
    return lines


def _readable(path: Path) -> bool:
    return path.suffix.lower() in (IMAGE_SUFFIXES | VIDEO_SUFFIXES)


def _known_suffixes() -> str:
    return " ".join(sorted(s.lstrip(".") for s in IMAGE_SUFFIXES | VIDEO_SUFFIXES))


def _missing(text: str, path: Path) -> str:
    parent = path.parent
    if path.exists():
        return f"--source {text}: is neither a file nor a folder"
    if not parent.is_dir():
        return f"--source {text}: no such file or folder (there is no folder {parent} either)"
    siblings = [p.name for p in parent.iterdir()]
    return f"--source {text}: no such file or folder{did_you_mean(path.name, siblings)}"


def _missing_or_damaged(path: str) -> str:
    if is_url(path):
        return "; check the address and the network"
    return " (damaged, or a format this OpenCV cannot read)" if Path(path).exists() else ": no such file"


def _why_no_frame(path: str) -> str:
    if is_url(path):
        return "fetch the file and give its path (many servers do not let a player jump to the index at the end)"
    return "the video is empty, damaged or in a format that this OpenCV cannot read"


def _with_path(path: str, message: str) -> str:
    return message if path in message else f"{path}: {message}"
