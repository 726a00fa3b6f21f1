"""Hostile input from outside a checkpoint: YAML, lists, labels, caches, pictures, names, addresses.

Each :class:`Hostile` writes one attack into an empty folder and gives the command that a victim would type. An attack
has failed when the command ends by itself with the expected status and one clear line, when nothing of ``PWNED`` ran,
and when nothing was written but the run's folder and the caches. ``scripts.faults`` prints the table, tests/security
runs the same attacks in one process.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.files import ROOT

NAMES = ("nine", "ten", "jack", "queen", "king", "ace")
PWNED = "pwned"
"""The file that every payload would make in the attack's folder."""

_CPU = ["--device", "cpu", "--img", "64"]


@dataclass(frozen=True)
class Hostile:
    """``build(folder)`` writes the attack and returns the command: a script and its flags, or ``-m`` and a module.

    ``says``: a pattern that stdout or stderr must show. ``status``: the exit status. One bad file among good ones is
    a warning and status 0 (1 from detect.py and --check-data, which count what they could not read).
    """

    name: str
    build: Callable[[Path], list[str]]
    says: str
    status: int = 2


# ---- what a victim has: a data set, weights, a run ----


def dataset(folder: Path, names: str = str(list(NAMES)), extra: str = "") -> Path:
    """A private copy of data/tiny with a data.yaml: its path."""
    root = folder / "set"
    shutil.copytree(ROOT / "data" / "tiny", root, ignore=shutil.ignore_patterns("*.npz"))
    path = root / "data.yaml"
    path.write_text(f"path: .\ntrain: images/train\nval: images/val\nnames: {names}\n{extra}", encoding="utf-8")
    return path


def weights(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    """Untrained weights of yolov5n with these class names; at a threshold of 0 they find every class everywhere."""
    import torch

    from models.yolo import DetectionModel
    from utils.checkpoint import save_checkpoint

    torch.manual_seed(0)
    model = DetectionModel("yolov5n.yaml", nc=len(names))
    path = folder / "w.pt"
    meta = {"yaml": model.yaml, "nc": len(names), "names": dict(enumerate(names))}
    save_checkpoint(path, model.state_dict(), meta)
    return path


def train(folder: Path, data: Path, *more: str) -> list[str]:
    """One epoch of the smallest training."""
    flags = ["--data", str(data), "--cfg", "yolov5n.yaml", "--weights", "", "--epochs", "1", "--batch", "4"]
    return ["train.py", *flags, "--workers", "0", "--project", str(folder / "runs"), *_CPU, *more]


def check(data: Path) -> list[str]:
    """The report on a data set, without a training."""
    return ["train.py", "--data", str(data), "--check-data"]


def val(folder: Path, data: Path) -> list[str]:
    """An evaluation without pictures."""
    flags = ["--weights", str(weights(folder)), "--data", str(data), "--workers", "0", "--batch", "2", "--noplots"]
    return ["val.py", *flags, "--project", str(folder / "runs"), *_CPU]


def detect(folder: Path, source: str | Path, *more: str, names: tuple[str, ...] = NAMES) -> list[str]:
    """Detection that leaves every kind of file."""
    flags = ["--weights", str(weights(folder, names)), "--source", str(source), "--conf", "0", "--max-det", "40"]
    every = ["--save-txt", "--save-csv", "--save-crop", "--project", str(folder / "runs")]
    return ["detect.py", *flags, *every, *_CPU, *more]


def picture(folder: Path, name: str = "good.jpg") -> Path:
    """A small good picture."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".jpg", np.full((48, 64, 3), 90, np.uint8))[1].tobytes())
    return path


# ---- YAML ----


def laughs() -> str:
    """Ten levels of ten aliases: a kilobyte that means ten thousand million texts."""
    lines = ['a0: &a0 ["lol", "lol"]']
    for level in range(1, 11):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    return "\n".join(lines) + "\n"


def _payload(folder: Path) -> str:
    return f'!!python/object/apply:os.system ["touch {folder / PWNED}"]'


def _text(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def _yaml_case(text: Callable[[Path], str], kind: str) -> Callable[[Path], list[str]]:
    """The same YAML as data set, model, hyper-parameters or opt.yaml of a run to resume."""

    def build(folder: Path) -> list[str]:
        if kind == "resume":
            run = folder / "run"
            (run / "weights").mkdir(parents=True)
            shutil.copy(weights(folder), run / "weights" / "last.pt")
            _text(run, "hyp.yaml", "lr0: 0.01\n")
            _text(run, "opt.yaml", text(folder))
            return ["train.py", "--resume", str(run)]
        bad = _text(folder, "bad.yaml", text(folder))
        if kind == "data":
            return train(folder, bad)
        return train(folder, dataset(folder), "--cfg" if kind == "model" else "--hyp", str(bad))

    return build


YAML_TEXTS: dict[str, tuple[Callable[[Path], str], str]] = {
    "!!python/object": (lambda f: f"names: {_payload(f)}\n", "tag"),
    "billion laughs": (lambda f: laughs(), "aliases"),
    "nested 100,000 deep": (lambda f: "a: " + "[" * 100_000, "nested"),
    "2 MB": (lambda f: "a: [" + "1," * 1_000_000 + "1]", "larger than"),
    "a number of 100,000 digits": (lambda f: "a: 0x" + "f" * 100_000 + "\n", "number"),
    "a sexagesimal number without end": (lambda f: "a: 1" + ":59" * 300_000 + "\n", "number"),
    "a list as key": (lambda f: "? [a, b]\n: 1\n", "key"),
    "!!timestamp, !!bool without sense": (lambda f: "a: !!timestamp x\nb: !!bool x\n", "timestamp"),
    "control characters": (lambda f: "a\0b: \x1b[2J\n", "not valid YAML|unacceptable"),
}
"""name: (text, what the message says)."""

YAML = [
    Hostile(f"YAML, {kind}: {name}", _yaml_case(text, kind), says)
    for name, (text, says) in YAML_TEXTS.items()
    for kind in (("data", "model", "hyp", "resume") if name in ("!!python/object", "billion laughs") else ("data",))
]


def _hyp(text: str) -> Callable[[Path], list[str]]:
    return lambda folder: train(folder, dataset(folder), "--hyp", str(_text(folder, "hyp.yaml", text)))


def _model(change: Callable[[str], str]) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        text = (ROOT / "models" / "yolov5n.yaml").read_text(encoding="utf-8")
        return train(folder, dataset(folder), "--cfg", str(_text(folder, "m.yaml", change(text))))

    return build


YAML += [
    Hostile("hyp: a learning rate of infinity", _hyp("lr0: .inf\n"), "expected a number"),
    Hostile("hyp: a rate of 1e999", _hyp("lr0: 1e999\n"), "expected a number"),
    Hostile(
        "model: a width of 1e300", _model(lambda t: t.replace("width_multiple: 0.25", "width_multiple: 1e300")), ""
    ),
    Hostile(
        "model: a thousand billion channels",
        _model(lambda t: t.replace("[64, 6, 2, 2]", "[1000000000000, 6, 2, 2]")),
        "parameters",
    ),
    Hostile(
        "model: 200 GB of weights",
        _model(lambda t: t.replace("width_multiple: 0.25", "width_multiple: 40")),
        "parameters",
    ),
    Hostile(
        "model: a thousand million layers in a row",
        _model(lambda t: t.replace("Conv, [64, 6, 2, 2]", "TransformerBlock, [64, 4, 1000000000]")),
        "more than 4096",
    ),
    Hostile(
        "model: eval in a row",
        _model(lambda t: t.replace("Conv, [64", "__import__('os').system, [64")),
        "unknown|no block|layer",
    ),
]


# ---- class names ----


def _named(names: str, *more: str) -> Callable[[Path], list[str]]:
    return lambda folder: train(folder, dataset(folder, names), *more)


def _yaml_names(*first: str) -> str:
    return json.dumps([*first, *NAMES[len(first) :]])


ODD_NAMES = (
    "../../../pwned",
    "=cmd|'/C calc'!A0",
    "<script>alert(1)</script>",
    "$\\frac{$x^",
    "/etc/cron.d/x",
    "_hidden",
)

CLASS_NAMES = [
    Hostile("class names: separators, HTML, formulas, mathtext", _named(_yaml_names(*ODD_NAMES)), "Results saved", 0),
    Hostile("class names: ANSI escapes", _named(_yaml_names("\x1b[2J\x1b]0;owned\x07")), "control character"),
    Hostile("class names: a name of 100,000 letters", _named(_yaml_names("x" * 100_000)), "longer than"),
    Hostile("class names: 100,000 classes of one name", _named("[" + "a," * 100_000 + "a]"), "more than 100,000"),
    Hostile(
        "class names in weights: separators, HTML, formulas, ANSI",
        lambda folder: detect(folder, picture(folder), names=(*ODD_NAMES[:5], "\x1b[2J")),
        "Results saved",
        0,
    ),
]


# ---- pictures ----


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that claims a size, with little behind it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = data or zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def jpeg_header(width: int, height: int) -> bytes:
    """A good small JPEG whose frame header claims another size."""
    data = bytearray(cv2.imencode(".jpg", np.full((16, 16, 3), 90, np.uint8))[1].tobytes())
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def tiff_header(width: int, height: int) -> bytes:
    """A little-endian TIFF of one strip that claims a size."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 4, height), (279, 4, (width * height) & 0xFFFFFFFF)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def bmp_header(width: int, height: int) -> bytes:
    """A 24-bit BMP that claims a size."""
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 64, 0, 0, 54) + info + bytes(64)


def webp_header(width: int, height: int) -> bytes:
    """An extended WebP whose canvas claims a size (at most 2**24 a side)."""
    body = (
        b"VP8X"
        + struct.pack("<I", 10)
        + bytes(4)
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    good = cv2.imencode(".webp", np.full((16, 16, 3), 90, np.uint8))[1].tobytes()
    body += good[12:]
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def zeros_bomb(side: int) -> bytes:
    """A whole PNG of black pixels: a few hundred kilobytes of file for side x side pixels."""
    packer, parts = zlib.compressobj(9), []
    row = bytes(1 + side * 3)
    for _ in range(side):
        parts.append(packer.compress(row))
    parts.append(packer.flush())
    return png_header(side, side, b"".join(parts))


def eps(folder: Path) -> bytes:
    """PostScript: a reader that hands it to Ghostscript runs a program."""
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(%pipe%touch {folder / PWNED}) (w) file\n".encode()


def bad_pictures(folder: Path) -> dict[str, bytes]:
    """File name: bytes."""
    good = cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[1].tobytes()
    return {
        "bomb.png": png_header(60_000, 60_000),
        "claims.png": png_header(2**31 - 1, 2**31 - 1),
        "chunk.png": png_header(64, 64)[:33] + b"\xff\xff\xff\xfftEXt" + png_header(64, 64)[33:],
        "end.png": png_header(64, 64)[:-12] + b"\xff\xff\xff\xffIEND" + bytes(4),
        "line.png": png_header(2_000_000, 12),
        "bomb.jpg": jpeg_header(65_500, 65_500),
        "bomb.tif": tiff_header(60_000, 60_000),
        "bomb.bmp": bmp_header(60_000, 60_000),
        "claims.bmp": bmp_header(2**31 - 1, 2**31 - 1),
        "bomb.webp": webp_header(2**24, 2**24),
        "script.tif": eps(folder),
        "cut.png": good[: len(good) // 2],
        "cut.jpg": jpeg_header(16, 16)[:300],
        "noise.jpg": b"\xff\xd8" + bytes(range(256)) * 4,
        "zero.png": png_header(0, 0),
        "empty.jpg": b"",
    }


def _pictures_set(folder: Path) -> Path:
    data = dataset(folder)
    label = next((data.parent / "labels" / "train").glob("*.txt")).read_bytes()
    for name, content in bad_pictures(folder).items():
        (data.parent / "images" / "train" / name).write_bytes(content)
        (data.parent / "labels" / "train" / name).with_suffix(".txt").write_bytes(label)
    return data


def _pictures_folder(folder: Path) -> Path:
    picture(folder / "in")
    for name, content in bad_pictures(folder).items():
        (folder / "in" / name).write_bytes(content)
    return folder / "in"


def _sparse(folder: Path) -> list[str]:
    picture(folder / "in")
    with open(folder / "in" / "huge.tif", "wb") as file:
        file.truncate(1 << 40)
    return detect(folder, folder / "in")


def _thin(folder: Path) -> list[str]:
    (folder / "in").mkdir()
    (folder / "in" / "thin.png").write_bytes(cv2.imencode(".png", np.zeros((1, 60_000, 3), np.uint8))[1].tobytes())
    return detect(folder, folder / "in")


def _val_bomb(folder: Path) -> list[str]:
    data = dataset(folder)
    (data.parent / "images" / "val" / "bomb.png").write_bytes(png_header(60_000, 60_000))
    return val(folder, data)


PICTURES = [
    Hostile("pictures: 16 bombs, cuts and scripts, train", lambda f: train(f, _pictures_set(f)), "16 corrupt", 0),
    Hostile("pictures: the same, --check-data", lambda f: check(_pictures_set(f)), "178,956,970 pixels", 1),
    Hostile("pictures: the same, detect", lambda f: detect(f, _pictures_folder(f)), "16 sources could not be read", 1),
    Hostile("pictures: a bomb, val", _val_bomb, "more than 178,956,970 pixels", 0),
    Hostile("pictures: a file of 1 TB", _sparse, "larger than", 1),
    Hostile("pictures: 60,000 x 1 pixels", _thin, "Results saved", 0),
]


# ---- labels ----


def bad_labels() -> dict[str, bytes]:
    """What a label file may hold, by what is wrong with it."""
    return {
        "nul": b"0 0.5\0 0.5 0.1 0.1\n",
        "latin1": b"0 0.5 0.5 0.1 0.1 \xe9\n",
        "utf16": "0 0.5 0.5 0.1 0.1\n".encode("utf-16"),
        "long_row": b"0 " + b"0.5 0.25 " * 400_000,
        "long_number": b"0 0." + b"3" * 1_000_000 + b" 0.5 0.1 0.1\n",
        "huge": b"1e308 0.5 0.5 0.1 0.1\n",
        "denormal": b"0 0.5 0.5 1e-320 1e-320\n",
        "many_faults": b"x\n" * 3_000_000,
        "ansi": b"\x1b[2J\x1b]0;owned\x07 0.5 0.5 0.1 0.1\n",
        "nan": b"0 nan inf -inf 1e999\n",
    }


def _labels_set(folder: Path) -> Path:
    data = dataset(folder)
    for name, content in bad_labels().items():
        picture(data.parent / "images" / "train", f"{name}.jpg")
        (data.parent / "labels" / "train" / f"{name}.txt").write_bytes(content)
    return data


def _large_label(folder: Path) -> list[str]:
    data = dataset(folder)
    label = next((data.parent / "labels" / "train").glob("*.txt"))
    with open(label, "wb") as file:
        file.truncate(1 << 40)
    return train(folder, data)


LABELS = [
    Hostile("labels: nine that are none", lambda f: train(f, _labels_set(f)), "9 corrupt", 0),
    Hostile("labels: the same, --single-cls", lambda f: train(f, _labels_set(f), "--single-cls"), "9 corrupt", 0),
    Hostile("labels: a file of 1 TB", _large_label, "larger than", 0),
]


# ---- lists, folders ----


def _list_set(folder: Path, lines: str) -> Path:
    data = dataset(folder)
    _text(data.parent, "train.txt", lines)
    data.write_text(data.read_text().replace("train: images/train", "train: train.txt"))
    return data


def _traversal(folder: Path) -> list[str]:
    (folder / "secret").mkdir()
    secret = picture(folder / "secret")
    (folder / "secret" / "good.txt").write_text("root:x:0:0:root\n")
    data = _list_set(folder, f"../secret/{secret.name}\n./images/train/../../../secret/{secret.name}\n")
    return train(folder, data)


def _deep(folder: Path) -> list[str]:
    data = dataset(folder)
    here = os.open(data.parent / "images" / "train", os.O_RDONLY)
    for _ in range(1500):  # longer than any path may be written: only relative steps make it
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    return check(data)


def _loops(folder: Path) -> list[str]:
    data = dataset(folder)
    images = data.parent / "images" / "train"
    for name in ("a", "b", "c"):
        (images / name).symlink_to(images)
    (images / "self.jpg").symlink_to(images / "self.jpg")
    return check(data)


def _glob_loops(folder: Path) -> list[str]:
    picture(folder / "in")
    for name in ("a", "b", "c"):
        (folder / "in" / name).symlink_to(folder / "in")
    return detect(folder, folder / "in" / "**" / "*.jpg")


LISTS = [
    Hostile("list: lines that climb out", _traversal, "not a number|rows can be used|separated", 2),
    Hostile(
        "list: /etc/passwd", lambda f: train(f, _list_set(f, "../../../../../../../etc/passwd\n")), "no images found"
    ),
    Hostile(
        "list: a line of a megabyte",
        lambda f: train(f, _list_set(f, "x" * 1_000_000 + ".jpg\n")),
        "no such image|too long",
    ),
    Hostile("list: NUL and ANSI", lambda f: train(f, _list_set(f, "a\0b.jpg\n\x1b[2J.jpg\n")), "no such image"),
    Hostile("folder: link loops, --check-data", _loops, "8 usable images", 1),
    Hostile("folder: link loops, detect **", _glob_loops, "Results saved", 0),
    Hostile("folder: 1,500 folders deep", _deep, "8 usable images", 0),
]


# ---- names of files, sources ----


def _file_names(folder: Path) -> list[str]:
    for name in (
        "=1+1.jpg",
        "@SUM(1).jpg",
        "\x1b[2J.jpg",
        "a\nb.jpg",
        "...jpg",
        "<b>.jpg",
        "-x.jpg",
        "y" * 250 + ".jpg",
    ):
        picture(folder / "in", name)
    return detect(folder, folder / "in")


def _streams(line: str) -> Callable[[Path], list[str]]:
    return lambda folder: detect(folder, _text(folder, "x.streams", line.replace("FOLDER", str(folder)) + "\n"))


def _no_video(folder: Path) -> list[str]:
    picture(folder / "in")
    riff = b"RIFF" + b"\xff" * 4 + b"AVI LIST" + b"\xff" * 4 + b"hdrlavih" + b"\xff" * 200
    (folder / "in" / "a.avi").write_bytes(riff)
    (folder / "in" / "b.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(12) + b"\xff\xff\xff\xffmoov" + b"\xff" * 400)
    (folder / "in" / "c.mkv").write_bytes(b"\x1aE\xdf\xa3" + b"\xff" * 300)
    (folder / "in" / "d.mp4").write_bytes(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    (folder / "in" / "concat:e.mp4").write_bytes(b"x")
    return detect(folder, folder / "in")


SOURCES = [
    Hostile("file names: formulas, ANSI, line ends, dots, 254 bytes", _file_names, "Results saved", 0),
    Hostile(".streams: file:///etc/passwd", _streams("file:///etc/passwd"), "expected an address"),
    Hostile(
        ".streams: a GStreamer pipeline",
        _streams("videotestsrc ! filesink location=FOLDER/pwned"),
        "expected an address",
    ),
    Hostile(".streams: concat:, subfile,", _streams("concat:/etc/passwd|/etc/hosts"), "expected an address"),
    Hostile(".streams: $(touch pwned)", _streams("$(touch FOLDER/pwned)"), "expected an address"),
    Hostile("videos: five with false headers", _no_video, "5 sources could not be read", 1),
]


# ---- caches, run folders ----


def _zip(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return out.getvalue()


def npy(shape: str, dtype: str = "'|u1'", data: bytes = b"") -> bytes:
    """An .npy file whose header claims ``shape``."""
    head = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}"
    head += " " * (-(len(head) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head.encode() + data


def good_cache(data: Path) -> bytes:
    """The label cache of a data set's val split, as a scan writes it."""
    from utils.label_cache import scan_labels

    scan_labels(data.parent / "images" / "val", len(NAMES), show=False)
    return (data.parent / "labels" / "val.cache.npz").read_bytes()


def bad_caches(folder: Path, good: bytes) -> dict[str, bytes]:
    """A good label cache with one thing changed."""
    pickle = f"cposix\nsystem\n(S'touch {folder / PWNED}'\ntR.".encode()
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    labels = np.lib.format.read_array(io.BytesIO(members["labels.npy"]))
    labels[0, 0] = 1e9
    meta = np.lib.format.read_array(io.BytesIO(members["meta.npy"]))
    offsets = f"({len(labels) + 1},)"
    changed = {
        "pickle": {"meta.npy": npy("(1,)", "'|O'", pickle)},
        "giant claim": {"points.npy": npy(f"({1 << 60}, 2)", "'<f4'")},
        "JSON 100,000 deep": {"meta.npy": npy("(100000,)", data=b"[" * 100_000)},
        "class 1e9": {"labels.npy": npy(str(labels.shape), "'<f4'", labels.tobytes())},
        "offsets out of bounds": {
            "point_offsets.npy": npy(offsets, "'<i8'", bytes(8 * len(labels)) + b"\xff" * 7 + b"\x7f")
        },
        "notes of another kind": {
            "meta.npy": npy(f"({len(meta)},)", data=meta.tobytes().replace(b"[", b"{", 1)[: len(meta)])
        },
    }
    files = {kind: _zip({**members, **change}) for kind, change in changed.items()}
    bomb = {**members, "points.npy": npy(f"({1 << 28}, 2)", "'<f4'", bytes(1 << 26))}
    return {**files, "zip bomb": _zip(bomb, zipfile.ZIP_DEFLATED), "plain pickle": pickle}


CACHE_KINDS = (
    "pickle",
    "giant claim",
    "JSON 100,000 deep",
    "class 1e9",
    "offsets out of bounds",
    "notes of another kind",
)
CACHE_KINDS += ("zip bomb", "plain pickle")


def _cache(kind: str) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        data = dataset(folder)
        bad = bad_caches(folder, good_cache(data))[kind]
        (data.parent / "labels" / "val.cache.npz").write_bytes(bad)
        return val(folder, data)

    return build


def _climbing_cache(folder: Path) -> list[str]:
    data = dataset(folder)
    with io.BytesIO(good_cache(data)) as file:
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr(f"../../../{PWNED}", b"x")
        (data.parent / "labels" / "val.cache.npz").write_bytes(file.getvalue())
    return val(folder, data)


def _old_run(folder: Path, change: Callable[[Path], None]) -> list[str]:
    """detect.py --exist-ok into a run folder that somebody prepared."""
    run = folder / "runs" / "exp"
    run.mkdir(parents=True)
    change(run)
    return detect(folder, picture(folder), "--exist-ok")


def _links(run: Path) -> None:
    victim = run.parents[1] / "victim"
    victim.mkdir()
    (victim / "mine.txt").write_text("mine")
    (run / "labels").symlink_to(victim)
    (run / "predictions.csv").symlink_to(victim / "mine.txt")


CACHES = [Hostile(f"label cache: {kind}", _cache(kind), "damaged or of another version", 0) for kind in CACHE_KINDS]
CACHES.append(Hostile("label cache: a member ../../../pwned", _climbing_cache, "Results saved", 0))
CACHES.append(Hostile("run folder: links that lead out", lambda f: _old_run(f, _links), "link"))

HOSTILE = [*YAML, *CLASS_NAMES, *PICTURES, *LABELS, *LISTS, *SOURCES, *CACHES]
"""Every attack of this module."""
