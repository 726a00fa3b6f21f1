"""The .engine file: what TensorRT serialised, behind a header about the model, for which TensorRT has no place.

4 bytes      length of the text, little-endian
text         JSON: the entries of deploy/metadata.py, each a JSON text itself, and ``builder``
the rest     the engine, for IRuntime::deserializeCudaEngine
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from deploy.metadata import Metadata, parse
from utils.errors import ExportError

LENGTH = 4
MAX_TEXT = 8_000_000
"""Bytes of the header, 100,000 class names with room to spare."""


@dataclass(frozen=True)
class Maker:
    """What built an engine: the Python ``module``, its ``version``, and the compute capabilities it is for; ``plugin``:
    name of the library that it needs, which lies beside it, empty for none."""

    module: str
    version: str
    targets: tuple[int, ...]
    plugin: str = ""

    def text(self) -> str:
        cards = ", ".join(f"{target // 10}.{target % 10}" for target in self.targets)
        return f"{self.module} {self.version} for compute capability {cards or 'unknown'}"


def pack_engine(engine: bytes, meta: Metadata, maker: Maker) -> bytes:
    """The file's bytes."""
    builder = {"module": maker.module, "version": maker.version, "targets": list(maker.targets)}
    builder |= {"plugin": maker.plugin} if maker.plugin else {}
    text = json.dumps({**meta.entries(), "builder": json.dumps(builder)}).encode()
    return len(text).to_bytes(LENGTH, "little") + text + engine


def read_engine(path: Path) -> tuple[Metadata, Maker, bytes]:
    """Take a file apart. Raises ExportError for one without this header, damaged or cut short within it."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(LENGTH), "little")
            text = file.read(length) if 0 < length <= MAX_TEXT else b""
            engine = file.read()
    except OSError as error:
        raise ExportError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        entries = json.loads(text)
        builder = json.loads(entries["builder"])
        maker = Maker(builder["module"], builder["version"], tuple(builder["targets"]), builder.get("plugin", ""))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ExportError(
            f"{path}: no header of class names and sizes; was it built by python -m deploy.tensorrt?"
        ) from None
    sound = all(isinstance(word, str) for word in (maker.module, maker.version, maker.plugin))
    sound = sound and (not maker.plugin or Path(maker.plugin).name == maker.plugin)  # beside the engine, nowhere else
    if not sound or not all(type(target) is int for target in maker.targets):
        raise ExportError(f"{path}: what it says of its builder cannot be; build it again")
    if not engine:
        raise ExportError(f"{path}: cut short: no engine behind its header")
    return parse(entries, str(path)), maker, engine
