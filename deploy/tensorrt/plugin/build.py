"""From kernels and C++ to one shared library, with the C++ compiler of the system: no nvcc, no CUDA, no TensorRT."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.tensorrt.plugin import compile as kernels
from models.common import DCN
from models.ops.geometry import Geometry, pair
from models.yolo import DetectionModel
from utils.errors import ConfigError, ExportError, MissingPackage, ResourceError
from utils.files import atomic_open

HERE = Path(__file__).resolve().parent
SOURCES = ("plugin.cpp", "kernels.cpp", "driver.cpp")
FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", "-fno-exceptions", "-fvisibility=hidden")
CUDA_INCLUDE = "/usr/local/cuda/include"
"""TensorRT's headers include one of CUDA's."""
OURS = "-Werror"
"""Against our own declarations; TensorRT's headers warn of what they deprecate."""


@dataclass(frozen=True)
class PluginOptions:
    """``layers`` that get kernels of their own; ``include``: folders of TensorRT's headers and of CUDA's, empty for our
    own declarations; ``compiler``: a command; ``tiles``: to try others for ``layers``."""

    layers: tuple[Geometry, ...] = ()
    types: tuple[str, ...] = tuple(kernels.TYPES)
    architectures: tuple[int, ...] = kernels.ARCHITECTURES
    include: tuple[str, ...] = ()
    compiler: str = "c++"
    tiles: Mapping[str, int] = field(default_factory=dict)


def layers_of(model: DetectionModel) -> tuple[Geometry, ...]:
    """The DCN layers of a model, each shape once."""
    found = []
    for layer in model.modules():
        if isinstance(layer, DCN):
            pairs = (pair(value) for value in (layer.stride, layer.padding, layer.dilation))
            outputs, group, *kernel = layer.weight.shape
            channels = layer.conv_offset_mask.in_channels
            groups = channels // group
            found.append(Geometry(*pairs, tuple(kernel), channels, outputs, groups, layer.offset_groups, logits=False))
    return tuple(dict.fromkeys(found))


def write_kernels(folder: Path, options: PluginOptions, progress=lambda text: None) -> int:
    """Compile the kernels into ``folder``, with the table that the C++ sources include; returns how many. Raises
    ConfigError for an architecture that is not known."""
    wanted = list(kernels.variants(options.layers, options.types, options.architectures, options.tiles))
    done = []
    for number, variant in enumerate(wanted):
        progress(f"kernel {number + 1} of {len(wanted)}")
        done.append(kernels.compile_variant(variant))
    kernels.write_table(done, folder)
    return len(done)


def build_library(target: str | Path, options: PluginOptions, progress=lambda text: None) -> int:
    """Write the library ``target``; returns how many kernels it holds.

    Raises ConfigError as :func:`write_kernels` and for a folder without TensorRT's headers, MissingPackage without a
    C++ compiler, ExportError with its first line where it fails, ResourceError for a folder that takes no file.
    """
    if options.include and not any((Path(folder) / "NvInferRuntime.h").is_file() for folder in options.include):
        folders = " ".join(options.include)
        raise ConfigError(f"--tensorrt {folders}: no NvInferRuntime.h there; give the folder of TensorRT's headers")
    try:
        with tempfile.TemporaryDirectory() as folder, atomic_open(target) as file:
            count = write_kernels(Path(folder), options, progress)
            progress("C++")
            library = Path(folder) / "library.so"
            compile_sources([*(HERE / name for name in SOURCES), Path(folder) / "kernels.S"], library, folder, options)
            file.write(library.read_bytes())
    except OSError as error:
        raise ResourceError(f"{target}: cannot be written ({error.strerror}); give another folder") from error
    return count


def compile_sources(sources: Iterable[Path], library: Path, kernels_folder: str | Path, options: PluginOptions) -> None:
    """Raises MissingPackage, ExportError."""
    headers = [OURS]
    if options.include:
        headers = ["-DDCNV2_TENSORRT_HEADERS", *(f"-isystem{folder}" for folder in (*options.include, CUDA_INCLUDE))]
    compiler = shlex.split(options.compiler)
    command = [*compiler, *FLAGS, *headers, f"-I{HERE}", f"-I{kernels_folder}", *map(str, sources), "-ldl"]
    try:
        done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    except FileNotFoundError:
        raise MissingPackage(f"a plugin (the C++ compiler {compiler[0]})", "g++ or clang, not from pip,") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise ExportError(f"{options.compiler}: {lines[0]}")
