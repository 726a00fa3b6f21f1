"""Hostile weights: payloads at every place of a pickle, tricks with the archive, lies about sizes, bombs."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.faults.hostile import PWNED, Hostile, dataset, picture
from scripts.upstream_imitation import checkpoint, imitate, stand_in, write

NOT_ALLOWED = "which is not allowed; nothing in the file was run"
FLAGS = ["--device", "cpu", "--img", "64"]


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple:
        return self.function, self.args


# ---- commands: each opens folder/w.pt ----


def detect(folder: Path) -> list[str]:
    flags = ["--weights", str(folder / "w.pt"), "--source", str(picture(folder)), "--project", str(folder / "runs")]
    return ["detect.py", *flags, *FLAGS]


def val(folder: Path) -> list[str]:
    flags = ["--weights", str(folder / "w.pt"), "--data", str(dataset(folder)), "--project", str(folder / "runs")]
    return ["val.py", *flags, "--workers", "0", *FLAGS]


def train(folder: Path) -> list[str]:
    flags = ["--weights", str(folder / "w.pt"), "--data", str(dataset(folder)), "--project", str(folder / "runs")]
    return ["train.py", *flags, "--epochs", "1", "--workers", "0", *FLAGS]


COMMANDS = (detect, val, train)


# ---- files ----


def command(folder: Path) -> str:
    return f"touch {folder / PWNED}"


def model(change: Callable[[dict], None] = lambda description: None) -> Any:
    """YOLOv5's yolov5n in imitation; ``change`` works on its description."""
    import torch

    from models.yolo import DetectionModel

    torch.manual_seed(0)
    made = imitate(DetectionModel("yolov5n.yaml", nc=6))
    change(made.__dict__["yaml"])
    return made


def layer(made: Any) -> dict[str, Any]:
    """Attributes of the first convolution."""
    first = made.__dict__["_modules"]["model"].__dict__["_modules"]["0"].__dict__["_modules"]["conv"]
    return first.__dict__


def in_layer(value: Any, key: str = "forward") -> dict:
    made = model()
    layer(made)[key] = value
    return checkpoint(made)


def in_parameters(value: Any) -> dict:
    made = model()
    layer(made)["_parameters"]["weight"] = value
    return checkpoint(made)


def archive(pickled: bytes, *more: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as out:
        for name, data in (("w/data.pkl", pickled), *more):
            out.writestr(name, data)
    return buffer.getvalue()


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def system(folder: Path) -> bytes:
    """The instructions that call os.system."""
    return b"cposix\nsystem\n" + text(command(folder)) + b"\x85R"


def doubled(levels: int) -> bytes:
    return b"\x80\x02]q\x00" + b"h\x00h\x00\x86q\x00" * levels + b"."


def overlapping() -> bytes:
    """Two entries with the same bytes: more inside than outside."""
    data = bytearray(archive(b"N.", ("w/data/0", b"x" * 2000), ("w/data/1", b"y")))
    at = data.rfind(b"PK\1\2")
    data[at + 20 : at + 28] = struct.pack("<II", 2000, 2000)
    return bytes(data)


def claims_of_the_end() -> bytes:
    """A table of contents of 4 GB."""
    data = bytearray(archive(b"N."))
    data[-10:-6] = b"\xff\xff\xff\xfe"
    return bytes(data)


STORAGE = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
)
LARGE_STORAGE = b"\x80\x02" + STORAGE + b"\x8a\x05\x00\x00\x00\x00\x01tQK\x00)).\x89)tR."
SMALL_STORAGE = b"\x80\x02" + STORAGE + b"K\x01tQK\x00\x8a\x06\x00\x00\x00\x00\x00\x01\x85K\x00\x85\x89)tR."


def rows(block: str, args: list) -> Callable[[dict], None]:
    def change(description: dict) -> None:
        description["backbone"][0] = [-1, 1, block, args]

    return change


def setting(key: str, value: Any) -> Callable[[dict], None]:
    return lambda description: description.update({key: value})


CONTENTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "os.system in meta": (
        lambda f: {"format": 1, "model": {}, "meta": {"x": Call(os.system, command(f))}, "train": None},
        f"calls posix.system, {NOT_ALLOWED}",
    ),
    "os.system in place of everything": (lambda f: Call(os.system, command(f)), "calls posix.system"),
    "eval, deep in opt": (
        lambda f: checkpoint(model(), opt={"a": [({"b": [Call(builtins.eval, f"open({str(f / PWNED)!r}, 'w')")]},)]}),
        "calls builtins.eval",
    ),
    "exec in a layer's attributes": (
        lambda f: in_layer(Call(builtins.exec, f"open({str(f / PWNED)!r}, 'w')")),
        "calls builtins.exec",
    ),
    "getattr in a layer's attributes": (lambda f: in_layer(Call(getattr, "x", "upper")), "calls builtins.getattr"),
    "open in place of a parameter": (lambda f: in_parameters(Call(open, str(f / PWNED), "w")), "calls io.open"),
    "os.system among the names": (
        lambda f: checkpoint(imitated_names(Call(os.system, command(f)))),
        "calls posix.system",
    ),
    "an unknown block named os.system": (
        lambda f: checkpoint(model(rows("os.system", [command(f)]))),
        "unknown block 'os.system'",
    ),
    "code as activation": (
        lambda f: checkpoint(model(setting("activation", f"__import__('os').system('{command(f)}')"))),
        "activation",
    ),
    "a width for a million million weights": (
        lambda f: checkpoint(model(setting("width_multiple", 10000.0))),
        "parameters|values",
    ),
    "a million repeats": (lambda f: checkpoint(model(setting("depth_multiple", 1e6))), "repeats|blocks"),
    "maps without end": (lambda f: checkpoint(model(rows("nn.Upsample", ["None", 4000, "nearest"]))), "makes a map of"),
    "input of 100,000 channels": (
        lambda f: checkpoint(model(lambda d: (rows("Conv", [64, 1, 2])(d), d.update(ch=100_000)))),
        "channels|values",
    ),
    "a thousand million classes": (
        lambda f: checkpoint(stand_in_with(nc=10**9)),
        "parameters|values",
    ),
}
"""Name: (what torch.save is given, what is said). Each is written in both of torch's forms."""

BYTES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "os.system in a storage's persistent id": (
        lambda f: archive(b"\x80\x02(X\x07\x00\x00\x00storage" + system(f) + b"tQ."),
        "calls posix.system",
    ),
    "os.system by INST": (
        lambda f: archive(b"(S'" + command(f).encode() + b"'\niposix\nsystem\n."),
        "calls posix.system",
    ),
    "os.system by OBJ": (lambda f: archive(b"(cposix\nsystem\n" + text(command(f)) + b"o."), "calls posix.system"),
    "os.system by NEWOBJ_EX": (
        lambda f: archive(b"\x80\x04cposix\nsystem\n" + text(command(f)) + b"\x85}\x92."),
        "calls posix.system",
    ),
    "torch.load": (lambda f: archive(b"\x80\x02ctorch\nload\n" + text("x.pt") + b"\x85R."), "calls torch.load"),
    "torch.hub.load": (
        lambda f: archive(b"\x80\x02ctorch.hub\nload\n" + text("a/b") + b"\x85R."),
        "calls torch.hub.load",
    ),
    "numpy's import by scalar": (
        lambda f: archive(b"\x80\x02cnumpy._core.multiarray\nscalar\n" + text("O8") + text("x") + b"\x86R."),
        "a number of numpy of an unknown type",
    ),
    "a callable for a tensor's class": (
        lambda f: archive(b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nN)}tR."),
        "calls posix.system for a tensor",
    ),
    "an extension code": (lambda f: archive(b"\x80\x02\x82\x01."), "an extension code"),
    "a pickle alone": (lambda f: pickle.dumps(Call(os.system, command(f))), "not a file that torch.save wrote"),
    "archive: a path out of it": (lambda f: archive(b"N.", (f"../../{PWNED}", b"x")), "which points out of it"),
    "archive: an absolute path": (lambda f: archive(b"N.", (f"{f / PWNED}", b"x")), "which points out of it"),
    "archive: compressed zeros": (
        lambda f: archive(b"\0" * 200_000_000, compression=zipfile.ZIP_DEFLATED),
        "a compressed or encrypted archive",
    ),
    "archive: entries over each other": (lambda f: overlapping(), "claims to hold"),
    "archive: a table of contents of 4 GB": (lambda f: claims_of_the_end(), "table of contents|damaged"),
    "4 GB of text": (lambda f: archive(b"\x80\x02X\xff\xff\xff\xff."), "4,294,967,295 bytes claimed"),
    "4 GB of bytes": (lambda f: archive(b"\x80\x05\x96\xff\xff\xff\xff\0\0\0\0."), "4,294,967,295 bytes claimed"),
    "16 GB of storage": (
        lambda f: archive(LARGE_STORAGE, ("w/data/0", b"1234")),
        "storage 0 claims 17,179,869,184 bytes",
    ),
    "a tensor of 4 TB on one value": (
        lambda f: archive(SMALL_STORAGE, ("w/data/0", b"1234")),
        "far larger than the file",
    ),
    "lists that double, sixty times": (lambda f: archive(doubled(60)), "unfolds to far more objects"),
    "half a million levels": (lambda f: archive(b"]" * 500_000 + b"a" * 499_999 + b"."), "nested deeper than"),
    "a list in itself": (lambda f: archive(b"]q\x00h\x00a."), "contains itself"),
    "five million marks": (lambda f: archive(b"(" * 5_000_000 + b"."), "far more objects"),
    "cut in the middle": (lambda f: archive(b"N.", ("w/data/0", b"x" * 5000))[:2500], "damaged or cut short"),
}
"""Name: (the file, what is said)."""


def imitated_names(value: Any) -> Any:
    made = model()
    made.__dict__["names"] = ["a", value]
    return made


def stand_in_with(**attributes: Any) -> Any:
    made = model()
    made.__dict__.update(attributes)
    return made


def _content(make: Callable[[Path], Any], zipped: bool, run: Callable) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        write(folder / "w.pt", make(folder), zipped)
        return run(folder)

    return build


def _bytes(make: Callable[[Path], bytes], run: Callable) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        (folder / "w.pt").write_bytes(make(folder))
        return run(folder)

    return build


def _pipe(folder: Path) -> list[str]:
    os.mkfifo(folder / "w.pt")
    return detect(folder)


def _module_on_the_path(folder: Path) -> list[str]:
    """The class's module lies beside the weights; importing it would leave a mark."""
    (folder / "their_code.py").write_text(f"open({str(folder / PWNED)!r}, 'w')")
    write(folder / "w.pt", checkpoint(stand_in("their_code.Model", {"yaml": {}})))
    return detect(folder)


HOSTILE = [
    Hostile(f"weights: {name}{'' if zipped else ' (old form)'}", _content(make, zipped, COMMANDS[number % 3]), says)
    for number, (name, (make, says)) in enumerate(CONTENTS.items())
    for zipped in ((True, False) if number < 4 else (True,))
]
HOSTILE += [
    Hostile(f"weights: {name}", _bytes(make, COMMANDS[number % 3]), says)
    for number, (name, (make, says)) in enumerate(BYTES.items())
]
HOSTILE += [
    Hostile("weights: a pipe", _pipe, "no such file|not a file"),
    Hostile("weights: a class whose module lies on the path", _module_on_the_path, "no weights found in it"),
]
"""Every attack of this module."""
