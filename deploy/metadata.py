"""What travels inside an exported file beside the weights: all that running it takes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from models.head import side_multiple
from models.yolo import DetectionModel
from utils.errors import ExportError
from utils.files import ROOT
from utils.safe_names import MAX_NAME, printable

FORMAT = 1
"""Of these entries; newer ones are refused."""
MAX_CLASSES = 100_000
MAX_SIDE = 65_536
MAX_ROWS = 30_000


@dataclass(frozen=True)
class Metadata:
    """``names`` in the order of the classes; ``stride``: what the sides of the input are multiples of, pixels;
    ``strides`` of the levels; ``imgsz`` (height, width) and ``batch`` the file was made for, and all it takes unless
    ``dynamic``; ``half``: float16 weights; ``int8``: eight bits; ``nms``: 0, or the most rows (n, 7) for a class and
    image that come out in place of all predictions; ``dcn``: the form of its DCN layers, empty without any; ``version``
    of this program."""

    names: tuple[str, ...]
    stride: int
    strides: tuple[float, ...]
    imgsz: tuple[int, int]
    batch: int = 1
    dynamic: bool = False
    half: bool = False
    int8: bool = False
    nms: int = 0
    dcn: str = ""
    version: str = ""
    task: str = "detect"
    format: int = FORMAT

    def entries(self) -> dict[str, str]:
        """Each field as JSON text, for formats that keep pairs of strings."""
        return {name: json.dumps(value) for name, value in asdict(self).items()}


def describe(model: DetectionModel, imgsz: tuple[int, int], **more: Any) -> Metadata:
    """The Metadata of a model; ``more`` are the fields about the file."""
    strides = tuple(float(stride) for stride in model.stride.tolist())
    names = tuple(model.names[number] for number in sorted(model.names))
    return Metadata(names, side_multiple(model.stride), strides, imgsz, version=program_version(), **more)


def parse(entries: Mapping[str, Any], source: str) -> Metadata:
    """From :meth:`Metadata.entries` of a file, which may come from anywhere: every value is checked.

    Raises ExportError, naming the file, for entries that are missing or cannot be.
    """
    known = {field.name for field in fields(Metadata)}
    found = {}
    for name in known & set(entries):
        try:
            found[name] = json.loads(entries[name])
        except (TypeError, ValueError, RecursionError):
            raise ExportError(f"{source}: its entry {name} is no JSON; was it written by export.py?") from None
    if not {"names", "stride", "strides", "imgsz"} <= set(found):
        raise ExportError(f"{source}: holds no class names, stride and size; only files of export.py can be run")
    return _checked(found, source)


def _checked(found: dict[str, Any], source: str) -> Metadata:
    def is_count(value: Any, most: int) -> bool:
        return type(value) is int and 1 <= value <= most

    names, strides, imgsz = found["names"], found["strides"], found["imgsz"]
    if type(found.get("format")) is int and found["format"] > FORMAT:
        raise ExportError(f"{source}: written by a newer version of this program; export it again or update")
    sound = (
        all(isinstance(value, list) and value for value in (names, strides, imgsz))
        and len(names) <= MAX_CLASSES
        and all(isinstance(name, str) for name in names)
        and len(strides) <= 16
        and all(type(stride) in (int, float) and 0 < stride <= MAX_SIDE for stride in strides)
        and len(imgsz) == 2
        and all(is_count(value, MAX_SIDE) for value in (*imgsz, found["stride"], found.get("batch", 1)))
        and all(type(found.get(name, False)) is bool for name in ("dynamic", "half", "int8"))
        and is_count(found.get("nms", 0) + 1 if type(found.get("nms", 0)) is int else None, MAX_ROWS)
        and all(isinstance(found.get(name, ""), str) for name in ("dcn", "version", "task"))
    )
    if not sound:
        raise ExportError(f"{source}: what it says of its classes and sizes cannot be; export it again")
    lists = {
        "names": tuple(printable(name[:MAX_NAME]) for name in names),
        "strides": tuple(strides),
        "imgsz": tuple(imgsz),
    }
    return Metadata(**{**found, **lists})


def program_version() -> str:
    """What git says of this checkout, or 'unknown' where it is none."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"
