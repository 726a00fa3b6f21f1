"""Reading pictures: every common format to RGB bytes, EXIF rotation applied; one clear line for what cannot be read.

Files are decoded from a byte buffer, so any path the file system accepts will do; nothing is ever written back.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".dng", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp", ".pfm", ".pgm", ".ppm"}
)
VIDEO_SUFFIXES = frozenset(
    {".asf", ".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".wmv"}
)  # a .gif is read as a video: it may move

MAX_PIXELS = 178_956_970
"""Largest picture read by default: Pillow's own limit against decompression bombs (half a gigabyte as RGB)."""
MAX_SIDE = 1 << 20  # OpenCV's own limit
MAX_FILE_BYTES = 2_000_000_000  # more than MAX_PIXELS take at 16 bits without compression
MAX_LIST_BYTES = 256_000_000  # some four million paths

# What Pillow may be asked to read. Never all it knows: PostScript it hands to Ghostscript, a program.
_PILLOW_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "DIB", "WEBP", "GIF", "PPM", "JPEG2000")

# what each reduction adds to the flags of OpenCV's decoder; grey there means only that no colour is named
_REDUCED = {1: 0, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4}
_REDUCED[8] = cv2.IMREAD_REDUCED_GRAYSCALE_8

_HEADER_BYTES = 1 << 16
_ORIENTATION_TAG = 0x0112
_JPEG_START, _JPEG_END, _PNG_START = b"\xff\xd8", b"\xff\xd9", b"\x89PNG\r\n\x1a\n"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start-of-frame markers, ITU T.81 table B.1


class Header(NamedTuple):
    """What the first bytes of a picture say: stored width and height, and the EXIF orientation 1..8."""

    width: int
    height: int
    orientation: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as shown: orientations 5 to 8 turn the picture by a quarter."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def is_image(path: str | Path) -> bool:
    """True for a name that ends like a picture (case does not matter)."""
    suffix = os.path.splitext(path)[1]
    return suffix in IMAGE_SUFFIXES or suffix.lower() in IMAGE_SUFFIXES


def is_video(path: str | Path) -> bool:
    """True for a name that ends like a video (case does not matter)."""
    return os.path.splitext(path)[1].lower() in VIDEO_SUFFIXES


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a picture as (H, W, 3) uint8 RGB, contiguous, turned as its EXIF orientation says.

    Grey is expanded, alpha dropped, 16 bits reduced to 8, CMYK converted. Raises DataError naming the file for one
    that is missing, empty, cut short, no picture, or larger than ``max_pixels``.
    """
    return decode_image(_read_bytes(path), str(path), max_pixels)


def read_at_least(path: str | Path, width: int, height: int) -> tuple[np.ndarray, tuple[int, int]]:
    """:func:`read_image`, but a JPEG of twice, four or eight times this size or more is read at a half, a quarter or an
    eighth, which the decoder gives for less than the whole. Returns the picture and the file's own (width, height).

    The decoder averages blocks of pixels in the process: the picture has less aliasing than one scaled by sampling.
    """
    data = _read_bytes(path)
    size = parse_header(data, str(path)).size
    reduction = 1
    if data.startswith(_JPEG_START):  # for other kinds OpenCV would decode the whole and resize it
        reduction = next(r for r in (8, 4, 2, 1) if r == 1 or (size[0] >= r * width and size[1] >= r * height))
    return decode_image(data, str(path), reduction=reduction), size


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS, reduction: int = 1) -> np.ndarray:
    """:func:`read_image` of bytes already in memory; ``name`` is what messages call them. ``reduction`` 1, 2, 4 or 8:
    sides divided by it, rounded up."""
    header = parse_header(data, name)
    _check_pixels(header, name, max_pixels)
    if not _is_complete(data):
        raise DataError(f"{name}: the image file is cut short ({len(data):,} bytes); copy it again")
    buffer = np.frombuffer(data, np.uint8)
    by_pillow = header.orientation != 1 and not data.startswith((_JPEG_START, _PNG_START))
    direct = getattr(cv2, "IMREAD_COLOR_RGB", None)  # OpenCV 4.11 and later
    flags = (direct or cv2.IMREAD_COLOR) | cv2.IMREAD_IGNORE_ORIENTATION | _REDUCED[reduction]
    try:
        image = None if by_pillow else cv2.imdecode(buffer, flags)
    except cv2.error:  # sides beyond OpenCV's own limit
        image = None
    if image is None:
        image = _decode_with_pillow(data, name, max_pixels)
        height, width = (-(-side // reduction) for side in image.shape[:2])
        return image if reduction == 1 else cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    if not direct:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return _turn(image, header.orientation)


def _check_pixels(header: Header, name: str, max_pixels: int) -> None:
    if max(header.width, header.height) > MAX_SIDE:
        raise DataError(f"{name}: {header.width}x{header.height}, a side of more than {MAX_SIDE:,} pixels")
    if header.width * header.height > max_pixels:
        raise DataError(f"{name}: {header.width}x{header.height} is more than {max_pixels:,} pixels; make it smaller")


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a picture as :func:`read_image` returns it, from its first bytes.

    Raises DataError when the file is missing, empty or no picture.
    """
    with _open(path) as file:
        head = file.read(_HEADER_BYTES)
        try:
            return parse_header(head, str(path)).size
        except DataError:
            rest = file.read()  # a long preamble (colour profile, maker notes) came before the size
            if not rest:
                raise
        return parse_header(head + rest, str(path)).size


def check_image(path: str | Path, min_side: int = 10) -> tuple[int, int]:
    """:func:`image_size` of a picture fit for a data set: also complete at its end, at least ``min_side`` pixels wide
    and high and of at most MAX_PIXELS.

    The pixels of JPEG and PNG files, which say where they end, are not decoded; others are. Raises DataError naming
    the file and the reason.
    """
    width, height = image_size(path)
    if min(width, height) < min_side:
        raise DataError(f"{path}: {width}x{height} pixels, smaller than {min_side} on a side")
    _check_pixels(Header(width, height, 1), str(path), MAX_PIXELS)
    with _open(path) as file:
        start = file.read(8)
        file.seek(-min(16, file.seek(0, os.SEEK_END)), os.SEEK_END)
        end = file.read()
        png_broken = start.startswith(_PNG_START) and not _png_chunks_join(file)
    jpeg_open = start.startswith(_JPEG_START) and not end.endswith(_JPEG_END)
    if png_broken or (jpeg_open and not _is_complete(_read_bytes(path))):
        raise DataError(f"{path}: the image file is cut short; copy it again")
    if not start.startswith((_JPEG_START, _PNG_START)):
        read_image(path)
    return width, height


def _png_chunks_join(file: io.BufferedReader | io.BytesIO) -> bool:
    """Whether the chunks of a PNG follow each other up to IEND; only their heads are read (PNG 3rd edition, 5.3)."""
    position = len(_PNG_START)
    while True:
        file.seek(position)
        head = file.read(8)
        if len(head) < 8 or not head[4:].isalpha():
            return False
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"IEND":
            return length == 0
        position += 12 + length


def list_images(sources: str | Path | Iterable[str | Path]) -> list[str]:
    """Paths of all pictures in folders (searched to the bottom), .txt lists and single files, sorted as text.

    A list has a path on each line (``#`` begins a comment): beginning with ``./`` it is relative to the list's
    folder, otherwise to the working folder or, failing that, to the list's. Raises DataError for a source that does
    not exist, and naming list and line for a listed picture that does not.
    """
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    found: list[str] = []
    for source in map(Path, sources):
        if source.is_dir():
            for root, names in walk(source):
                folder = os.path.join(root, "")
                found += [folder + name for name in names if is_image(name)]
        elif source.suffix.lower() == ".txt" and source.is_file():
            found += filter(is_image, _read_list(source))
        elif source.is_file():
            found += filter(is_image, [str(source)])
        else:
            raise DataError(f"{source}: no such folder or file")
    found.sort()  # a folder's are in order already, which makes this quick
    return [path for path, before in zip(found, ["", *found[:-1]]) if path != before]


def parse_header(data: bytes, name: str) -> Header:
    """Size and orientation from the first bytes of a picture. Raises DataError when they are not those of one."""
    if not data:
        raise DataError(f"{name}: the file is empty")
    try:
        if data.startswith(_JPEG_START):
            return _jpeg_header(data)
        if data.startswith(_PNG_START):
            return _png_header(data)
    except (struct.error, IndexError):
        raise DataError(f"{name}: the image file is cut short ({len(data):,} bytes); copy it again") from None
    return _pillow_header(data, name)


def _open(path: str | Path, max_bytes: int = MAX_FILE_BYTES) -> io.BufferedReader:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise DataError(f"{path}: cannot be read (not a file)")
        if status.st_size > max_bytes:
            raise DataError(f"{path}: larger than {max_bytes // 1_000_000:,} MB ({status.st_size:,} bytes)")
        return open(path, "rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except ValueError:
        raise DataError(f"{path}: no such file (a name cannot hold a zero byte)") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _read_bytes(path: str | Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    with _open(path, max_bytes) as file:
        return file.read()


def walk(folder: str | Path) -> Iterator[tuple[str, list[str]]]:
    """A folder and all below it, each with the names of its files: through links to folders as well, but each real
    folder once, so that links in a circle end; hidden names left out."""
    waiting, seen = [str(folder)], set()
    while waiting:  # not by os.walk: it calls itself for each level, and folders may lie a thousand deep
        root = waiting.pop()
        try:
            status = os.stat(root)
            entries = sorted((e for e in os.scandir(root) if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError:  # not ours to read, or a path longer than the system allows
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders, names = [], []
        for entry in entries:
            if _is_dir(entry):
                folders.append(entry)
            else:
                names.append(entry.name)
        yield root, names
        waiting += [entry.path for entry in reversed(folders)]


def _is_dir(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _read_list(path: Path) -> list[str]:
    found = []
    text = _read_bytes(path, MAX_LIST_BYTES).decode("utf-8-sig", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or (line.startswith("#") and not is_image(line)):
            continue
        beside = path.parent / line
        image = beside if line.startswith("./") or not os.path.exists(line) else Path(line)
        if not os.path.exists(image):  # False, not an error, for a name too long or with a zero byte
            raise DataError(f"{path}:{number}: no such image: {str(image)[:500]}")
        found.append(str(image))
    return found


def _jpeg_header(data: bytes) -> Header:
    """Walk the marker segments up to the frame header (ITU T.81, B.2)."""
    position, orientation = 2, 1
    while True:
        if data[position] != 0xFF:
            raise struct.error("no marker where one must be")
        marker = data[position + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD7:  # fill byte; markers without a length
            position += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return Header(width, height, orientation)
        if marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[position + 10 : position + 2 + length])
        if marker in (0xD9, 0xDA):
            raise struct.error("no frame header")
        position += 2 + length


def _png_header(data: bytes) -> Header:
    if data[12:16] != b"IHDR":
        raise struct.error("another chunk before the header")
    width, height = struct.unpack_from(">II", data, 16)
    position = 8
    while position + 8 <= len(data):  # an eXIf chunk stands before the pixels where writers follow custom
        (length,), kind = struct.unpack_from(">I", data, position), data[position + 4 : position + 8]
        if kind == b"eXIf":
            return Header(width, height, _exif_orientation(data[position + 8 : position + 8 + length]))
        if kind == b"IDAT":
            break
        position += 12 + length
    return Header(width, height, 1)


def _exif_orientation(tiff: bytes) -> int:
    """The orientation entry of the first directory of an EXIF block (TIFF 6.0 layout); 1 when there is none."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(count):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * entry)
            if tag == _ORIENTATION_TAG:
                return value if 1 <= value <= 8 else 1
    except struct.error:  # a damaged EXIF block does not spoil the picture
        pass
    return 1


def _pillow_header(data: bytes, name: str) -> Header:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            orientation = image.getexif().get(_ORIENTATION_TAG, 1)
            stored = image.size
            if getattr(image, "tag_v2", None) is not None and orientation >= 5:
                stored = stored[::-1]  # Pillow gives a TIFF's size after turning it
            return Header(*stored, orientation if orientation in range(1, 9) else 1)
    except Image.DecompressionBombError:
        raise DataError(f"{name}: more than {MAX_PIXELS:,} pixels; make it smaller") from None
    except MemoryError:
        raise
    except Exception:  # its parsers raise KeyError, TypeError, OverflowError and more on bytes made to mislead them
        raise DataError(f"{name}: not an image, or of a kind that cannot be read") from None


def _decode_with_pillow(data: bytes, name: str, max_pixels: int) -> np.ndarray:
    """The kinds that OpenCV declines. Pillow may find another size than ours, in a PNG with two headers."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            _check_pixels(Header(*image.size, 1), name, max_pixels)
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (MemoryError, DataError):
        raise
    except Exception as error:  # as above
        raise DataError(f"{name}: the image cannot be decoded ({error}); open and save it again") from None


def _is_complete(data: bytes) -> bool:
    """False for a JPEG or PNG without its end mark (some cameras add bytes after it; other kinds: unknown, True)."""
    if data.startswith(_JPEG_START):
        if data.endswith(_JPEG_END):
            return True
        scan = data.rfind(b"\xff\xda")  # after the last start of scan the end mark can only be itself
        return data.find(_JPEG_END, max(scan, 0)) > 0
    # OpenCV takes as much memory as a chunk says it is long: 4 GB, for a file of a kilobyte
    return not data.startswith(_PNG_START) or _png_chunks_join(io.BytesIO(data))


def _turn(image: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation (Exif 2.3, 4.6.4): mirror for 2, 4, 5, 7; turn for 3, 5 to 8."""
    if orientation == 1:
        return image
    if orientation in (5, 6, 7, 8):
        image = cv2.transpose(image)
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return image if flip is None else cv2.flip(image, flip)
