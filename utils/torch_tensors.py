"""Tensors out of the storages of a torch file, and the other calls that such a file may make.

What a file says about a tensor is checked against the storage that is there, and all tensors together may not be much
larger than the file.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from torch import Tensor

from utils.pickle_records import Budget, Call, Named, Record, Refused, show

ROOM = 64_000_000
"""Bytes that tensors may have beyond four times the file: one storage may lie under several."""
WORK_PER_TENSOR = 20

DTYPES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Double": torch.float64,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}


def damaged(size: int) -> Refused:
    """What is said of a file whose container is broken."""
    return Refused(f"is damaged or cut short ({size:,} bytes); use another checkpoint")


class Storage:
    """The numbers that tensors are views of: ``flat``, one-dimensional."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat


def flat_tensor(data: bytearray | bytes, dtype: torch.dtype) -> Tensor:
    """A one-dimensional tensor of these numbers; it takes over the memory of a bytearray and copies bytes."""
    if not data:
        return torch.empty(0, dtype=dtype)
    raw = torch.frombuffer(data if isinstance(data, bytearray) else bytearray(data), dtype=torch.uint8)
    return raw != 0 if dtype is torch.bool else raw.view(dtype)  # other bytes than 0 and 1 are no booleans


def described(identity: Any) -> tuple[torch.dtype, str, int]:
    """(dtype, key, elements) of a storage's persistent id."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise Refused("refers to something else than its own storages")
    kind, key, count = identity[1], identity[2], identity[4]
    if not isinstance(kind, Named) or kind.name not in DTYPES:
        raise Refused(f"a storage of an unknown kind ({show(getattr(kind, 'name', type(kind).__name__))})")
    if type(count) is not int or count < 0:
        raise Refused("damaged: the description of a storage")
    return DTYPES[kind.name], key_of(key), count


def key_of(key: Any) -> str:
    """What a file calls a storage or tensor by: short text or a number."""
    if not isinstance(key, (str, int)) or len(str(key)) > 100:
        raise Refused("damaged: the description of a storage")
    return str(key)


def same_storage(storage: Storage, dtype: torch.dtype, count: int) -> Storage:
    if storage.flat.dtype != dtype or len(storage.flat) != count:
        raise Refused("one storage is described in two ways")
    return storage


class Tensors:
    """The calls that make tensors and other plain values, for one file of ``size`` bytes."""

    def __init__(self, size: int) -> None:
        self.left = 4 * size + ROOM
        self.calls: dict[str, Call] = {
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_parameter": self.parameter,
            "torch._utils._rebuild_parameter_with_state": self.parameter,
            "torch._tensor._rebuild_from_type_v2": self.typed,
            "torch._tensor._rebuild_from_type": self.typed,
            **_VALUES,
        }

    def tensor(self, args: tuple, budget: Budget) -> Tensor:
        """(storage, offset, size, stride, ...) -> a view of the storage, checked against its length."""
        budget.spend(WORK_PER_TENSOR)
        storage, offset, size, stride = args[:4] if len(args) >= 4 else (None,) * 4
        numbers = (offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (-1,)
        sound = isinstance(storage, Storage) and all(type(n) is int and 0 <= n < 2**62 for n in numbers)
        if not sound or len(size) != len(stride) or len(size) > 16:
            raise Refused("damaged: the description of a tensor")
        count, last = math.prod(size), offset + sum((n - 1) * step for n, step in zip(size, stride))
        if count and last >= len(storage.flat):
            raise Refused(f"a tensor of {count:,} values reaches beyond its storage of {len(storage.flat):,}")
        self.left -= count * storage.flat.element_size()
        if self.left < 0:
            raise Refused("its tensors claim to be far larger than the file")
        return storage.flat.as_strided(size, stride, offset if count else 0) if count else storage.flat.new_empty(size)

    def parameter(self, args: tuple, budget: Budget) -> Tensor:
        """(tensor, requires_grad, hooks, ...) -> the tensor."""
        if not args or not isinstance(args[0], Tensor):
            raise Refused("damaged: a parameter without a tensor")
        return args[0]

    def typed(self, args: tuple, budget: Budget) -> Tensor:
        """(rebuild function, class, its arguments, attributes) -> what the rebuild function gives."""
        name = args[0].name if len(args) >= 3 and isinstance(args[0], Named) else ""
        make = {"_rebuild_tensor_v2": self.tensor, "_rebuild_parameter": self.parameter}
        function = make.get(name.removeprefix("torch._utils."))
        if function is None or not isinstance(args[2], tuple):
            raise Refused(f"calls {show(name) or 'something'} for a tensor, which is not allowed")
        return function(args[2], budget)


# -- values of torch and numpy that are plain data --------------------------------------------------------------------


def _size(args: tuple, budget: Budget) -> tuple:
    if len(args) != 1 or not isinstance(args[0], (tuple, list)):
        raise Refused("damaged: a torch.Size")
    budget.spend(len(args[0]))
    return tuple(args[0])


def _device(args: tuple, budget: Budget) -> str:
    return ":".join(str(part) for part in args if isinstance(part, (str, int)))[:40]


def _record_of(name: str) -> Call:
    return lambda args, budget: Record(name, args)


_NUMBER_CODES = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "b1": "?"}
_NUMBER_CODES |= {"u8": "Q", "u4": "I", "u2": "H", "u1": "B"}


def _numpy_number(args: tuple, budget: Budget) -> float | int | bool:
    """numpy's scalar(dtype, bytes) -> a number of Python."""
    dtype, data = args if len(args) == 2 else (None, None)
    code = dtype.args[0] if isinstance(dtype, Record) and dtype.name == "numpy.dtype" and dtype.args else None
    if not isinstance(code, str) or code not in _NUMBER_CODES or not isinstance(data, bytes):
        raise Refused("a number of numpy of an unknown type")
    order = ">" if isinstance(dtype.other, tuple) and dtype.other[1:2] == (">",) else "<"
    return struct.unpack(order + _NUMBER_CODES[code], data)[0]


_VALUES: dict[str, Call] = {
    "torch.Size": _size,
    "torch.device": _device,
    "numpy.dtype": _record_of("numpy.dtype"),
    **{f"numpy.{core}.multiarray.scalar": _numpy_number for core in ("_core", "core")},
    **{f"numpy.{core}.multiarray._reconstruct": _record_of("numpy.ndarray") for core in ("_core", "core")},
}
