"""Compile the Triton kernels for GPUs that need not be there; fail where one needs more shared memory than they have.

    python -m tests.models.compile_kernels 80 89 90

A process of its own, because in that of the tests the kernels are interpreted.
"""

from __future__ import annotations

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.ops import dcn_kernels as kernels
from models.ops import dcn_launch
from models.ops.geometry import Geometry

SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes a program may have, by compute capability (CUDA C++ Programming Guide, table of technical specifications)."""
CASES = ((torch.float16, 160, 320), (torch.bfloat16, 320, 640), (torch.float32, 80, 160))
BACKWARD = {"EXACT": False, "NEED_X": True}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def signature(kernel, dtype: torch.dtype) -> dict[str, str]:
    """Types of the arguments that are no compile-time constants."""
    pointers = {name: f"*{NAMES[dtype]}" for name in ("x", "raw", "weight", "out", "grad", "grad_raw")}
    pointers |= {name: "*fp32" for name in ("bias", "grad_x", "fixed", "partial")}
    return {p.name: "constexpr" if p.is_constexpr else pointers.get(p.name, "i32") for p in kernel.params}


def compiled(kernel, geometry: Geometry, dtype: torch.dtype, tiles: dict, extra: dict, capability: int):
    tiles = {k: v for k, v in tiles.items() if k != "PROGRAMS"}
    options = {k: tiles.pop(k) for k in ("num_warps", "num_stages")}
    constants = {**dcn_launch.constants(geometry), **tiles, "PRECISION": "ieee", **extra}
    types = signature(kernel, dtype)
    if extra.get("SHARES", 1) > 1:
        types["out"] = "*fp32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if types[name].startswith("*")}
    source = ASTSource(kernel, types, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        shared = SHARED[capability]
        for dtype, channels, outputs in CASES:
            precision = {"PRECISION": "tf32x3" if dtype == torch.float32 else "ieee"}  # as gradient_precision()
            x, weight = torch.empty(1, channels, 1, 1), torch.empty(outputs, channels, 3, 3)
            geometry = Geometry.of(x, weight, (2, 2), (1, 1), (1, 1), 1, True)
            forward = dcn_launch.forward_tiles(geometry, dtype, shared)
            for kernel, tiles, extra in (
                (kernels.forward, forward, {"HAS_BIAS": True, "SILU": True, "SHARES": 1}),
                (kernels.forward, forward, {"HAS_BIAS": False, "SILU": False, "SHARES": 9}),
                (kernels.backward_input, dcn_launch.input_tiles(geometry, dtype, shared), {**BACKWARD, **precision}),
                (kernels.backward_weight, dcn_launch.weight_tiles(geometry, dtype), {"SPLITS": 8, **precision}),
            ):
                used = compiled(kernel, geometry, dtype, tiles, extra, capability).metadata.shared
                name = (
                    f"sm_{capability} {NAMES[dtype]} {channels}->{outputs} {kernel.__name__}: {used} of {shared} bytes"
                )
                print(name, flush=True)
                if used > shared:
                    raise SystemExit(f"too much shared memory: {name}")


if __name__ == "__main__":
    main()
