"""Reading an .npz file that anybody may have written: plain arrays of the expected kinds, no larger than the file."""

from __future__ import annotations

import os
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

# what numpy, zipfile and json raise on bytes made to mislead them (found by scripts.fuzz)
NPZ_DAMAGE = (OSError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, MemoryError, RecursionError)
NPZ_DAMAGE += (zipfile.BadZipFile, zlib.error, tokenize.TokenError, SyntaxError, NotImplementedError, RuntimeError)


def read_npz(path: str | Path, kinds: Mapping[str, tuple[type, int | None]]) -> dict[str, np.ndarray]:
    """The arrays that ``kinds`` names: name -> (dtype, columns; None for one axis only).

    Nothing is unpickled. Raises one of NPZ_DAMAGE for compressed members (a bomb: ours are stored), claims beyond the
    file's own size, and arrays that are missing or of another kind.
    """
    with open(path, "rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        with zipfile.ZipFile(raw) as archive:
            members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
            raise ValueError("compressed, or larger than the file")
        raw.seek(0)
        with np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in kinds}
    for name, (dtype, columns) in kinds.items():
        shape = arrays[name].shape
        if (
            arrays[name].dtype != dtype
            or len(shape) != 1 + (columns is not None)
            or shape[1:] != (columns,)[: len(shape) - 1]
        ):
            raise ValueError(f"{name} is {arrays[name].dtype} {shape}")
    return arrays


def check_offsets(offsets: np.ndarray, count: int, total: int) -> None:
    """Raise ValueError unless ``offsets`` (count + 1,) run from 0 up to ``total`` without a step back."""
    if len(offsets) != count + 1 or offsets[0] != 0 or offsets[-1] != total or (offsets[1:] < offsets[:-1]).any():
        raise ValueError("offsets do not fit")
