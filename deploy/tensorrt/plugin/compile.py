"""The plugin's kernels as machine code of several GPUs, made ahead of time by Triton; no GPU and no nvcc needed.

A library holds, for every architecture and type, one kernel that is told a layer's numbers at run time, and for the
layers that were asked for, one with these numbers compiled in, which is faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deploy.tensorrt.plugin import kernels
from models.ops.dcn_launch import forward_tiles
from models.ops.geometry import Geometry
from utils.errors import ConfigError

SHARED = {
    75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10,
    103: 227 << 10, 120: 99 << 10, 121: 99 << 10,
}  # fmt: skip
"""Bytes a program may have, by compute capability (CUDA C++ Programming Guide, table of technical specifications)."""
ARCHITECTURES = (75, 80, 86, 89, 90, 120)
"""Code for x.y runs on x.z too, where z > y, up to 8.9; from 9.0 on only on x.y itself."""
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CODES = {"fp32": 0, "fp16": 1, "bf16": 7}
"""TensorRT's."""
FORWARD, PARTIAL, ADD_UP, TRANSPOSE = range(4)
"""``Kind`` of kernels.h."""
NUMBERS = ("C", "N", "CG", "NG", "CO", "CS", "OG", "K", "KW", "SH", "SW", "PH", "PW", "DH", "DW")
"""Those of a layer, in the order of the kernel's parameters and of ``Layer`` in kernels.h."""
CHANNELS = NUMBERS[:6]
ALIGNED = 8
"""Channels that 16 bytes hold in half precision: layers all of whose CHANNELS are multiples get wider loads."""
BLOCK = {ADD_UP: 1024, TRANSPOSE: 32}
ANY = {ALIGNED: Geometry((1, 1), (1, 1), (1, 1), (3, 3), 256, 256, 1, 1, False)}
ANY[1] = replace(ANY[ALIGNED], outputs=64)
"""Their tiles are those of the kernels for any layer; code without wide loads grows with the tile."""


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for. ``numbers`` of a layer, empty for any layer; ``multiple``: of which all channels
    have to be one."""

    kind: int
    type: str
    architecture: int
    numbers: tuple[int, ...] = ()
    multiple: int = 1
    tiles: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Compiled:
    """A cubin, and how its kernel ``name`` is launched: bytes of dynamic shared memory, threads of a block."""

    variant: Variant
    name: str
    shared: int
    threads: int
    image: bytes


def numbers_of(geometry: Geometry) -> tuple[int, ...]:
    """In the order of NUMBERS."""
    g = geometry
    values = {
        "C": g.channels, "N": g.outputs, "CG": g.channels // g.groups, "NG": g.outputs // g.groups,
        "CO": g.channels // g.offset_groups, "CS": g.segment, "OG": g.offset_groups, "K": g.taps, "KW": g.kernel[1],
        "SH": g.stride[0], "SW": g.stride[1], "PH": g.padding[0], "PW": g.padding[1], "DH": g.dilation[0],
        "DW": g.dilation[1],
    }  # fmt: skip
    return tuple(values[name] for name in NUMBERS)


def variants(
    layers: Iterable[Geometry], types: Iterable[str], architectures: Iterable[int], tiles: Mapping[str, int]
) -> Iterator[Variant]:
    """All that a library holds, in the order of preference. ``tiles``: for ``layers``, in place of the usual ones."""
    layers, types = list(dict.fromkeys(layers)), list(types)
    for architecture in architectures:
        if architecture not in SHARED:
            raise ConfigError(f"--arch {architecture}: expected some of {', '.join(map(str, SHARED))}")
        for type in types:
            for geometry in layers:
                yield from _both(Variant(FORWARD, type, architecture, numbers_of(geometry)), geometry, tiles)
            for multiple in ANY:
                yield from _both(Variant(FORWARD, type, architecture, (), multiple), ANY[multiple], {})
            yield Variant(ADD_UP, type, architecture)
        for type in {min(TYPES[type].itemsize, 4): type for type in types}.values():
            for multiple in (ALIGNED, 1):
                yield Variant(TRANSPOSE, type, architecture, (), multiple)


def _both(variant: Variant, geometry: Geometry, tiles: Mapping[str, int]) -> Iterator[Variant]:
    usual = forward_tiles(geometry, TYPES[variant.type], SHARED[variant.architecture])
    if variant.architecture < 80:  # without its products in registers by fours, a wider tile does not fit them
        usual["BN0"], usual["BN1"] = min(128, usual["BN0"]), 0 if usual["BN0"] > 128 else usual["BN1"]
    for kind in (FORWARD, PARTIAL):
        yield replace(variant, kind=kind, tiles=tuple({**usual, **tiles}.items()))


def compile_variant(variant: Variant) -> Compiled:
    """Raises ConfigError where no choice of stages fits the GPU's shared memory."""
    kernel = {ADD_UP: kernels.add_up, TRANSPOSE: kernels.transpose}.get(variant.kind, kernels.deform_conv)
    tiles = dict(variant.tiles) or {"num_warps": 4, "num_stages": 1, "BLOCK": BLOCK[variant.kind]}
    for stages in range(tiles["num_stages"], 0, -1):
        done = _compile(kernel, variant, {**tiles, "num_stages": stages})
        meta = done.metadata
        if meta.shared <= SHARED[variant.architecture]:
            assert not any(getattr(meta, f"{kind}_scratch_size", 0) for kind in ("global", "profile"))
            return Compiled(variant, meta.name, meta.shared, 32 * meta.num_warps, done.asm["cubin"])
    raise ConfigError(f"a layer is too wide for the shared memory of compute capability {variant.architecture}")


def _compile(kernel, variant: Variant, tiles: dict[str, int]):
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    constants = {**tiles, **dict(zip(NUMBERS, variant.numbers))}
    if kernel is kernels.deform_conv:
        constants |= {"PARTIAL": variant.kind == PARTIAL, "PRECISION": "ieee"}
    types = signature(kernel, variant)
    attributes = {}
    for i, name in enumerate(types):
        aligned = 16 if types[name].startswith("*") else variant.multiple if name in (*CHANNELS, "R", "S") else 1
        if name in constants:
            types[name] = "constexpr"
        elif aligned > 1:
            attributes[(i,)] = [["tt.divisibility", aligned]]
    source = ASTSource(kernel, types, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", variant.architecture, 32), options=options)


def signature(kernel, variant: Variant) -> dict[str, str]:
    """Types of all arguments."""
    wide = variant.type == "fp32"
    own = {"size": "i64", "partial": "*fp32", "out": "*fp32" if variant.kind == PARTIAL else f"*{variant.type}"}
    own |= {name: "*i32" if wide else "*i16" for name in ("source", "target")}
    own |= {name: f"*{variant.type}" for name in ("x", "offset", "mask", "weight", "bias")}
    return {parameter.name: own.get(parameter.name, "i32") for parameter in kernel.params}


def write_table(compiled: Iterable[Compiled], folder: Path) -> None:
    """``kernels.inc``, rows of the table in kernels.cpp, and ``kernels.S``, the code that they point to."""
    rows, code = [], [".section .rodata"]
    for number, each in enumerate(compiled):
        v, tiles = each.variant, dict(each.variant.tiles)
        (folder / f"{number}.cubin").write_bytes(each.image)
        label = f"dcnv2_kernel_{number}"
        file = (folder / f"{number}.cubin").resolve()
        code += [".balign 64", f".globl {label}", f".hidden {label}", f"{label}:", f'.incbin "{file}"']
        patch = tiles.get("BM", BLOCK.get(v.kind, 0)), tiles.get("TW", 1), tiles.get("BN0", 0) + tiles.get("BN1", 0)
        numbers = f"ARRAY({', '.join(map(str, v.numbers or [0] * len(NUMBERS)))})"
        what = [v.architecture, CODES[v.type], v.kind, int(bool(v.numbers)), v.multiple, numbers]
        rows.append(f"ROW({', '.join(map(str, [*what, *patch, each.name, each.shared, each.threads, label]))})")
    code += ['.section .note.GNU-stack,"",%progbits']
    (folder / "kernels.S").write_text("\n".join(code) + "\n")
    (folder / "kernels.inc").write_text("\n".join(rows) + "\n")
