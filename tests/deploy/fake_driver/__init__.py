"""The plugin's library with texts for kernels, and a CUDA driver that understands them (libcuda.cpp)."""

from __future__ import annotations

import subprocess
from pathlib import Path

from deploy.tensorrt.plugin.build import HERE, SOURCES, PluginOptions, compile_sources
from deploy.tensorrt.plugin.compile import CODES, FORWARD, PARTIAL, Compiled, Variant, variants, write_table

SHARED, THREADS = 100, 128
NAMES = ("deform_conv", "deform_conv", "add_up", "transpose")


def build_driver(folder: Path) -> Path:
    """libcuda.so.1; once it is open, whoever asks the linker for that name gets it."""
    library = folder / "libcuda.so.1"
    flags = ["-O2", "-std=c++17", "-Wall", "-Wextra", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["c++", *flags, str(Path(__file__).parent / "libcuda.cpp"), "-o", str(library)], check=True)
    return library


def build_plugin(folder: Path, options: PluginOptions) -> Path:
    """libdcnv2.so of these options; its kernels.S and kernels.inc are left in ``folder``."""
    folder.mkdir(exist_ok=True)
    wanted = variants(options.layers, options.types, options.architectures, options.tiles)
    write_table([_text(variant) for variant in wanted], folder)
    compile_sources([*(HERE / name for name in SOURCES), folder / "kernels.S"], folder / "libdcnv2.so", folder, options)
    return folder / "libdcnv2.so"


def _text(variant: Variant) -> Compiled:
    tiles = dict(variant.tiles) if variant.kind in (FORWARD, PARTIAL) else {}
    size = [tiles.get("BM", 0), tiles.get("TW", 0), tiles.get("BN0", 0) + tiles.get("BN1", 0)]
    fixed = int(bool(variant.numbers))
    name = NAMES[variant.kind]
    words = ["KERNEL", name, variant.kind, CODES[variant.type], fixed, *size, SHARED, THREADS, *variant.numbers]
    return Compiled(variant, name, SHARED, THREADS, " ".join(map(str, words)).encode() + b"\0")
