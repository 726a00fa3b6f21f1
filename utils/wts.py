"""The .wts file: tensors as text, the way tensorrtx's C++ programs read weights.

Line 1 holds the number of tensors. Then one line a tensor: its name, a space, the number of its values, a space, and
for each value a space and 8 hex digits, the bits of the float32. There are no shapes and no types in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from utils.errors import CheckpointError
from utils.files import atomic_open

META = "metadata.json"
"""Name of the tensor whose values are the bytes of a JSON text about the model. C++ readers pass over it, as over every
name they do not ask for."""

CHUNK = 1 << 18
"""Values turned into text or back at a time: bounds the memory, and stays in the processor's caches."""
MAX_TENSORS = 50_000
MAX_NAME = 200
MAX_META = 1_000_000
"""Bytes of the JSON text."""


def write_wts(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> int:
    """Write tensors of any dtype as float32, ``meta`` (plain data) as one more; returns the size in bytes.

    ``path`` is replaced when the new file is complete on disk. Raises ValueError for a name with white space, which no
    reader could take apart, and OSError.
    """
    for name in tensors:
        if not name or any(character.isspace() for character in name) or len(name) > MAX_NAME:
            raise ValueError(f"{name!r} cannot be the name of a tensor in a .wts file")
    extra = {META: _bytes_of(meta)} if meta is not None else {}
    with atomic_open(path) as file:
        file.write(f"{len(tensors) + len(extra)}\n".encode())
        for name, tensor in {**tensors, **extra}.items():
            _write_tensor(file, name, tensor.detach())
        return file.tell()


def _write_tensor(file: BinaryIO, name: str, tensor: Tensor) -> None:
    values = tensor.to("cpu", torch.float32).contiguous().numpy().reshape(-1)
    file.write(f"{name} {len(values)} ".encode())
    for start in range(0, len(values), CHUNK):
        # big-endian bytes, one space every 4: twice as fast as a table of digits, 14 times a loop over the values
        file.write(b" " + values[start : start + CHUNK].astype(">f4").tobytes().hex(" ", -4).encode())
    file.write(b"\n")


def _bytes_of(meta: Mapping[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(meta).encode()), dtype=torch.float32)


def read_wts(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """``{name: float32 (n,)}`` without shapes, and what the file says of its model ({} for files of other writers).

    Raises CheckpointError, naming the line, for a file that is missing, cut short or no .wts.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            tensors = dict(_tensors(path, file, os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return tensors, _meta(path, tensors.pop(META, None))


def _tensors(path: Path, file: BinaryIO, size: int) -> Iterator[tuple[str, Tensor]]:
    head = file.readline(32).strip()
    if not head.isdigit() or not 0 < int(head) <= MAX_TENSORS:
        raise CheckpointError(f"{path}:1: not a .wts file: expected the number of tensors, found {head[:20]!r}")
    for line in range(2, int(head) + 2):
        name, count = _header(path, file, line)
        if count * 9 > size - file.tell():  # before any memory is taken
            raise CheckpointError(f"{path}:{line}: cut short: {name} should have {count:,} values")
        yield name, torch.from_numpy(_values(path, line, name, file, count))
        if file.read(1) not in (b"\n", b""):
            raise CheckpointError(f"{path}:{line}: {name} has more values than the {count:,} it names")


def _header(path: Path, file: BinaryIO, line: int) -> tuple[str, int]:
    """The name and the count, up to and with the space behind it, read byte by byte: a line may hold gigabytes."""
    words: list[bytes] = []
    for longest in (MAX_NAME, 12):
        word = b""
        while len(word) <= longest and (byte := file.read(1)) not in (b" ", b"\n", b""):
            word += byte
        words.append(word)
    name = words[0].decode("utf-8", "replace")
    if not name or not name.isprintable() or not words[1].isdigit() or len(words[1]) > 12:
        what = f"found {words[0][:40]!r}" if words[0] else "the file ends"
        raise CheckpointError(f"{path}:{line}: expected 'NAME COUNT VALUES...', {what}: not a .wts file, or cut short")
    return name, int(words[1])


@lru_cache(maxsize=1)
def _pairs() -> np.ndarray:
    """(65536,) int16: the byte that two hex digits make, read together as a little-endian number; -1 for all others."""
    digits = {character: int(character, 16) for character in "0123456789abcdefABCDEF"}
    table = np.full(1 << 16, -1, np.int16)
    for high, upper in digits.items():
        for low, lower in digits.items():
            table[ord(high) | ord(low) << 8] = upper << 4 | lower
    return table


def _values(path: Path, line: int, name: str, file: BinaryIO, count: int) -> np.ndarray:
    """(count,) float32 from as many times a space and 8 digits."""
    values, pairs = np.empty(count, np.float32), _pairs()
    for start in range(0, count, CHUNK):
        length = min(CHUNK, count - start)
        text = np.frombuffer(file.read(length * 9), np.uint8)
        text = text.reshape(-1, 9) if len(text) == length * 9 else np.zeros((1, 9), np.uint8)
        octets = pairs[np.ascontiguousarray(text[:, 1:]).view("<u2")]
        if (text[:, 0] != ord(" ")).any() or (octets < 0).any():
            raise CheckpointError(f"{path}:{line}: a value of {name} is not a space and 8 hex digits")
        values[start : start + length] = octets.astype(np.uint8).view(">f4")[:, 0]
    return values


def _meta(path: Path, values: Tensor | None) -> dict[str, Any]:
    if values is None:
        return {}
    try:
        if len(values) > MAX_META:
            raise ValueError
        found = json.loads(bytes(int(value) for value in values.tolist()))
    except (ValueError, OverflowError, RecursionError):
        raise CheckpointError(f"{path}: {META} in it is damaged") from None
    return found if isinstance(found, dict) else {}
