"""Run the CUDA C++ kernels of models/ops/cuda on the CPU: compiled by the C++ compiler against emulate.h."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from models.ops.nvrtc import SOURCES

HERE = Path(__file__).parent
COMPILER = "c++"


class Kernel:
    """As models.ops.nvrtc.Kernel."""

    fits = True

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.shared = self._library.shared_bytes()

    def launch(self, grid: tuple[int, int], arguments: ctypes.Structure, device: torch.device) -> None:
        assert device.type == "cpu"
        assert self._library.launch(ctypes.byref(arguments), *grid) == 0


def kernel(source: str, constants: Mapping[str, int], device: torch.device) -> Kernel:
    """In place of models.ops.nvrtc.kernel."""
    return _compile(source, tuple(sorted(constants.items())))


@functools.cache
def _compile(source: str, constants: tuple[tuple[str, int], ...]) -> Kernel:
    files = sorted([*SOURCES.glob("*.cu*"), *HERE.glob("*.h"), *HERE.glob("*.cpp")])
    texts = b"".join(file.read_bytes() for file in files)
    key = hashlib.sha256(texts + repr((source, constants)).encode()).hexdigest()[:24]
    library = Path(tempfile.gettempdir()) / f"emulated-{key}.so"
    if not library.exists():
        defines = [f"-D{name}={value}" for name, value in constants]
        defines += ["-DEMULATE", f'-DSOURCE="{source}.cu"', f"-DENTRY={source}"]
        options = ["-O1", "-w", "-std=c++17", "-shared", "-fPIC", f"-I{SOURCES}", f"-I{HERE}"]
        part = library.with_suffix(f".{os.getpid()}.part")  # a second worker of pytest-xdist may be at it too
        command = [COMPILER, *options, *defines, str(HERE / "main.cpp"), "-o", str(part)]
        subprocess.run(command, check=True)
        part.replace(library)
    return Kernel(library)
