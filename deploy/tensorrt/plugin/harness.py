"""The plugin without an engine: found in TensorRT's own registry, created and called as TensorRT would, from Python.

For tests and measurements. harness.cpp makes the calls; the registry is that of any library of TensorRT's, the smallest
being libnvinfer_dispatch.so of the package tensorrt-dispatch-cu13-libs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from deploy.tensorrt.plugin.build import HERE, PluginOptions, compile_sources
from utils.errors import ExportError

LINEAR, HWC8, HWC = 0, 2, 8
INT32 = 5
BUILD, RUNTIME = 0, 1
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 7}


@dataclass(frozen=True)
class Settings:
    """The plugin's fields."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: tuple[int] = (1,)
    offset_groups: tuple[int] = (1,)


class Field(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    ]


class Fields(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int32), ("fields", ctypes.POINTER(Field))]


class Shapes(ctypes.Structure):
    """Of x, offset, mask, weight, bias and the output; ``type`` and ``format`` are TensorRT's numbers."""

    _fields_ = [
        ("dims", (ctypes.c_int64 * 4) * 6),
        ("inputs", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
    ]

    @classmethod
    def of(cls, shapes: Sequence[Sequence[int]], output: Sequence[int], dtype: torch.dtype, format: int) -> Shapes:
        made = cls(inputs=len(shapes), type=CODES[dtype], format=format)
        for number, shape in enumerate([*shapes, *[()] * (5 - len(shapes)), output]):
            for axis, side in enumerate(shape):
                made.dims[number][axis] = side
        return made


def build_harness(target: Path) -> None:
    """Compile harness.cpp into the shared library ``target``. Raises MissingPackage, ExportError."""
    compile_sources([HERE / "harness.cpp"], target, HERE, PluginOptions())


class Harness:
    """The creator of a plugin ``library`` in the registry of ``tensorrt``, a library of TensorRT's. A registry has one
    plugin of a name: without ``tensorrt`` the library is asked itself."""

    def __init__(self, harness: Path, tensorrt: Path | None, library: Path) -> None:
        self.calls = ctypes.CDLL(str(harness))
        for name in ("find_creator", "create", "attach", "cloned"):
            getattr(self.calls, name).restype = ctypes.c_void_p
        for name in ("serialized", "field_names"):
            getattr(self.calls, name).restype = ctypes.POINTER(Fields)
        self.calls.workspace_bytes.restype = ctypes.c_int64
        registry = str(tensorrt).encode() if tensorrt else None
        creator = self.calls.find_creator(registry, str(library).encode(), b"DCNv2")
        if not creator:
            raise ExportError(f"{library}: {tensorrt or 'the linker'} does not take it")
        self.creator = ctypes.c_void_p(creator)

    def field_names(self) -> list[str]:
        return [name for name, *_ in _listed(self.calls.field_names(self.creator))]

    def create(self, settings: Settings | Mapping[str, Sequence[int]], phase: int = BUILD, kind: int = INT32) -> Plugin:
        """Raises ExportError where the creator refuses."""
        values = asdict(settings) if isinstance(settings, Settings) else settings
        arrays = {name: (ctypes.c_int32 * len(numbers))(*numbers) for name, numbers in values.items()}
        fields = (Field * len(arrays))(
            *(Field(n.encode(), ctypes.addressof(array), kind, len(array)) for n, array in arrays.items())
        )
        return self._plugin(self.calls.create(self.creator, fields, len(arrays), phase))

    def recreate(self, plugin: Plugin) -> Plugin:
        """As when an engine is opened: from the fields that ``plugin`` serialises."""
        given = self.calls.serialized(plugin.handle).contents
        return self._plugin(self.calls.create(self.creator, given.fields, given.count, RUNTIME))

    def _plugin(self, handle: int | None) -> Plugin:
        if not handle:
            raise ExportError("the plugin was not created")
        return Plugin(self, handle)


class Plugin:
    """One plugin object."""

    def __init__(self, harness: Harness, handle: int) -> None:
        self.harness, self.calls, self.handle = harness, harness.calls, ctypes.c_void_p(handle)

    def __del__(self) -> None:
        self.calls.destroy(self.handle)

    def attached(self) -> Plugin:
        return Plugin(self.harness, self.calls.attach(self.handle))

    def cloned(self) -> Plugin:
        return Plugin(self.harness, self.calls.cloned(self.handle))

    def serialized(self) -> dict[str, tuple[int, ...]]:
        return {name: values for name, _, values in _listed(self.calls.serialized(self.handle))}

    def supports(self, shapes: Shapes, types: Sequence[int], formats: Sequence[int], position: int) -> bool:
        numbers = [(ctypes.c_int32 * len(each))(*each) for each in (types, formats)]
        return bool(self.calls.supports(self.handle, ctypes.byref(shapes), *numbers, position))

    def configure(self, shapes: Shapes) -> bool:
        return self.calls.configure(self.handle, ctypes.byref(shapes)) == 0

    def workspace_bytes(self, shapes: Shapes) -> int:
        return self.calls.workspace_bytes(self.handle, ctypes.byref(shapes))

    def shape_change(self, shapes: Shapes) -> bool:
        return self.calls.shape_change(self.handle, ctypes.byref(shapes)) == 0

    def enqueue(
        self, shapes: Shapes, inputs: Sequence[Tensor], out: Tensor, workspace: Tensor, stream: int | None = None
    ) -> bool:
        """On torch's current stream, or the given one."""
        pointers = (ctypes.c_void_p * len(inputs))(*(tensor.data_ptr() for tensor in inputs))
        stream = torch.cuda.current_stream().cuda_stream if stream is None else stream
        places = (ctypes.c_void_p(each) for each in (out.data_ptr(), workspace.data_ptr(), stream))
        return self.calls.enqueue(self.handle, ctypes.byref(shapes), pointers, *places) == 0


def _listed(fields) -> list[tuple[str, int, tuple[int, ...]]]:
    """Names, types and values, which are empty for a creator's list."""
    found = []
    for number in range(fields.contents.count):
        field = fields.contents.fields[number]
        values = ctypes.cast(field.data, ctypes.POINTER(ctypes.c_int32)) if field.data else None
        numbers = tuple(values[i] for i in range(field.length)) if values else ()
        found.append((field.name.decode(), field.type, numbers))
    return found
