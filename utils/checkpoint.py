"""Checkpoint files: plain data in, plain data out, whole or absent, and never any code run.

Format 1: ``{"format": 1, "model": state dict, "meta": {...}, "train": {...} or None}``, written by ``torch.save``.
"model" is the averaged model, "meta" what rebuilds it (yaml, nc, names, ...), "train" what ``--resume`` needs. It
holds nothing but tensors, numbers, strings, lists, tuples and dicts, so ``torch.load(weights_only=True)`` opens it.
"""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.errors import CheckpointError
from utils.files import atomic_open
from utils.pickle_records import Named, Record, records, show, walk
from utils.torch_file import read_torch_file

FORMAT = 1
"""Newest format that is read, and the one that is written."""

_HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read. ``model``: state dict; ``train``: None once stripped."""

    path: Path
    model: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] | None = None

    def describe(self) -> str:
        """One line: what it is, how far it was trained, when, and its size in parameters."""
        parts = []
        if "nc" in self.meta:
            parts.append(f"{self.meta['nc']} classes")
        if self.meta.get("epoch") is not None:
            parts.append(f"epoch {self.meta['epoch']}")
        if self.meta.get("date"):
            parts.append(str(self.meta["date"]))
        floating = [tensor for tensor in self.model.values() if tensor.is_floating_point()]
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in floating})
        parts.append(f"{sum(t.numel() for t in floating):,} values in {'/'.join(dtypes) or 'no tensors'}")
        parts.append("with training state" if self.train else "weights only")
        return f"{self.path}: {', '.join(parts)}"


def save_checkpoint(
    path: str | Path, model_state: dict[str, Tensor], meta: dict[str, Any], train: dict[str, Any] | None = None
) -> None:
    """Write a checkpoint; ``path`` is replaced when the new file is complete on disk, not before.

    Numpy scalars and subclasses of str, int, float, list and dict are stored as the plain type. Raises TypeError,
    naming the entry, for anything else (a bug of the caller), and OSError when the disk is full or not writable.
    """
    content = {
        "format": FORMAT,
        "model": _plain(dict(model_state), "model"),
        "meta": _plain(meta, "meta"),
        "train": _plain(train, "train"),
    }
    try:
        with atomic_open(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch covers what ends a write with "unexpected pos"
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        if isinstance(error.__context__, OSError):
            raise _named(error.__context__, path) from None
        raise
    except OSError as error:
        raise _named(error, path) from None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of this program, tensors on the CPU; no code in the file is ever run.

    Raises CheckpointError, in one line, for a file that is missing, empty, cut short, damaged (checksums are
    compared), of another program, of a newer format, or that holds objects rather than plain data.
    """
    return as_checkpoint(Path(path), read_torch_file(path))


def is_own(content: Any) -> bool:
    """Whether the content of a torch file looks like a checkpoint of this program, sound or not."""
    return isinstance(content, dict) and {"format", "model", "meta"} <= content.keys()


def strip_checkpoint(path: str | Path, output: str | Path | None = None) -> int:
    """Leave only what using the model needs: no training state, weights in half precision. Returns the new size in
    bytes. Writes to ``output``, or back to ``path``. Raises CheckpointError and OSError like reading and saving."""
    checkpoint = read_checkpoint(path)
    target = Path(output or path)
    save_checkpoint(target, {key: half_precision(tensor) for key, tensor in checkpoint.model.items()}, checkpoint.meta)
    return target.stat().st_size


def rng_state() -> dict[str, Any]:
    """The state of the random generators of Python, numpy and torch (CPU and every GPU), as plain data."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back :func:`rng_state`; GPUs that are not here, or were not there, are passed over."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index, saved in enumerate(state["cuda"][:available]):
        torch.cuda.set_rng_state(saved.cpu(), index)


def as_checkpoint(path: Path, content: Any) -> Checkpoint:
    """The parts of a file's content, after checking their types. Raises CheckpointError."""
    if not is_own(content):
        raise CheckpointError(f"{path}: not a checkpoint of this program (it holds {_what(content)})")
    version = content["format"]
    if type(version) is int and version > FORMAT:
        raise CheckpointError(
            f"{path}: written by a newer version of this program (format {version}, known here up to {FORMAT}); update"
        )
    model, meta, train = content["model"], content["meta"], content.get("train")
    sound = (
        type(version) is int
        and version >= 1
        and isinstance(model, dict)
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in model.items())
        and isinstance(meta, dict)
        and (train is None or isinstance(train, dict))
    )
    odd = _first_odd(meta, _PLAIN) or _first_odd(train, (*_PLAIN, Tensor))
    if not sound or odd:
        raise CheckpointError(f"{path}: not a checkpoint of this program ({odd or 'its parts have unexpected types'})")
    return Checkpoint(path, model, meta, train)


_PLAIN = (type(None), bool, int, float, str, dict, list, tuple)


def _first_odd(content: Any, allowed: tuple[type, ...]) -> str:
    """What in ``content`` is of another type, or an empty text."""
    for value in walk(content):
        if not isinstance(value, allowed):
            named = isinstance(value, (Record, Named))
            return f"it holds an object, {show(value.name if named else type(value).__name__)}"
        if isinstance(value, dict) and not all(isinstance(key, (str, int, float)) for key in value):
            return "a key in it is neither text nor a number"
    return ""


def _what(content: Any) -> str:
    if not isinstance(content, dict):
        return f"an object of {show(content.name)}" if isinstance(content, Record) else f"a {type(content).__name__}"
    keys = ", ".join(show(str(key)) for key in list(content)[:4]) + (", ..." if len(content) > 4 else "")
    objects = (r for r in records(content) if not r.name.startswith(("numpy.", "torch.")))
    found = next(objects, None)
    hint = (
        f"; YOLOv5's files go to --weights or through python -m models.convert, here: {show(found.name)}"
        if found
        else ""
    )
    return f"a dict of {keys}{hint}"


def _plain(value: Any, where: str) -> Any:
    """A copy of ``value`` made of exact plain types. Tensors are detached and keep no memory beyond their own."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        tensor = value.detach()
        shares = tensor.layout == torch.strided and tensor.untyped_storage().nbytes() > tensor.nbytes
        return tensor.clone() if shares else tensor
    if isinstance(value, np.generic):
        return _plain(value.item(), where)
    for base in (int, float, str):  # torch.__version__, numpy.float64, enumerations with values
        if isinstance(value, base):
            return base(value)
    if isinstance(value, dict):
        return {_plain_key(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(f"checkpoint entry {where}: {type(value).__name__} is not plain data")


def _plain_key(key: Any, where: str) -> Any:
    if isinstance(key, Tensor) or not isinstance(key, (str, int, float)):
        raise TypeError(f"checkpoint entry {where}: key {key!r} is not a string or number")
    return _plain(key, where)


def half_precision(tensor: Tensor) -> Tensor:
    """A floating tensor in float16, unless a value would become infinite (a BN variance may be large)."""
    if not tensor.is_floating_point() or (tensor.numel() and tensor.abs().max() > _HALF_MAX):
        return tensor
    return tensor.half()


def _named(error: OSError, path: str | Path) -> OSError:
    """The same error with the file's name, which a failed write does not carry."""
    return OSError(error.errno or errno.EIO, error.strerror or str(error), str(path))
