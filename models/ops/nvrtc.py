"""CUDA C++ kernels from source, without nvcc: compiled by NVRTC, which every CUDA build of torch brings along, loaded
through the CUDA driver. A second or less each on first use; kept in a folder of the user's cache from then on.

A machine without these libraries has no CUDA kernels of ours: :func:`obstacle` says why, and Triton's take over.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "cuda"
HEADERS = ("device.cuh", "sample.cuh")
MAX_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"""


class CudaKernelError(RuntimeError):
    """A kernel did not compile, load or start; the text is NVRTC's or the driver's."""


class Kernel:
    """One kernel on one device: its function and the bytes of shared memory that it asks for."""

    def __init__(self, image: bytes, name: str, device: torch.device) -> None:
        driver = _driver()
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # makes torch's context current
            self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
            _check(driver.cuModuleLoadData(ctypes.byref(self._module), image))
            _check(driver.cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()))
            self.shared = self._constant("SHARED_BYTES")
            self.threads = self._constant("LAUNCH_THREADS")
            limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
            self.fits = self.shared <= limit
            if self.fits:
                _check(driver.cuFuncSetAttribute(self._function, MAX_SHARED, self.shared))

    def _constant(self, name: str) -> int:
        address, size, value = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_int()
        driver = _driver()
        _check(driver.cuModuleGetGlobal_v2(ctypes.byref(address), ctypes.byref(size), self._module, name.encode()))
        _check(driver.cuMemcpyDtoH_v2(ctypes.byref(value), address, 4))
        return value.value

    def launch(self, grid: tuple[int, int], arguments: ctypes.Structure, device: torch.device) -> None:
        """Start it on torch's current stream of ``device``; ``arguments`` is its one parameter."""
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            _check(
                _driver().cuLaunchKernel(
                    self._function, *grid, 1, self.threads, 1, 1, self.shared, ctypes.c_void_p(stream), parameters, None
                )
            )


def kernel(source: str, constants: Mapping[str, int], device: torch.device) -> Kernel:
    """The kernel ``source``.cu compiled with ``constants`` for ``device``; the same object every time. Raises
    CudaKernelError."""
    return _kernel(source, tuple(sorted(constants.items())), device.index or 0)


@functools.cache
def _kernel(source: str, constants: tuple[tuple[str, int], ...], index: int) -> Kernel:
    device = torch.device("cuda", index)
    major, minor = torch.cuda.get_device_capability(device)
    return Kernel(_cached(source, constants, f"sm_{major}{minor}"), source, device)


def _cached(source: str, constants: tuple[tuple[str, int], ...], architecture: str) -> bytes:
    """The compiled kernel, from the user's cache where it is there; a folder that cannot be written is done without."""
    texts = [(SOURCES / name).read_text() for name in (f"{source}.cu", *HEADERS)]
    key = hashlib.sha256(repr((texts, constants, architecture, nvrtc_version())).encode()).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    file = Path(base) / "dcn-yolov5" / "kernels" / f"{source}-{key[:32]}.cubin"
    try:
        return file.read_bytes()
    except OSError:
        image = compile_source(source, dict(constants), architecture)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as whole:
            whole.write(image)
        os.replace(whole.name, file)
    except OSError:
        pass
    return image


def compile_source(source: str, constants: Mapping[str, int], architecture: str) -> bytes:
    """Machine code of ``source``.cu for ``architecture`` ("sm_90"); needs NVRTC, but no GPU. Raises CudaKernelError
    with the compiler's text."""
    library, program = _nvrtc(), ctypes.c_void_p()
    names = (ctypes.c_char_p * len(HEADERS))(*[name.encode() for name in HEADERS])
    texts = (ctypes.c_char_p * len(HEADERS))(*[(SOURCES / name).read_bytes() for name in HEADERS])
    text = (SOURCES / f"{source}.cu").read_bytes()
    file = f"{source}.cu".encode()
    if library.nvrtcCreateProgram(ctypes.byref(program), text, file, len(HEADERS), texts, names):
        raise CudaKernelError("NVRTC did not take the source")
    try:
        options = [f"--gpu-architecture={architecture}", "-std=c++17", *(f"-D{k}={v}" for k, v in constants.items())]
        given = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        if library.nvrtcCompileProgram(program, len(options), given):
            raise CudaKernelError(f"{source}.cu: {_text(library.nvrtcGetProgramLog, program)}")
        return _bytes(library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(get, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    getattr(_nvrtc(), f"{get.__name__}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw


def _text(get, program: ctypes.c_void_p) -> str:
    return _bytes(get, program).rstrip(b"\0").decode(errors="replace")


def obstacle() -> str | None:
    """Why kernels cannot be compiled and run here, or None. Asks for a GPU; :func:`nvrtc_version` does not."""
    return _obstacle()


# What torch.compiler.assume_constant_result does, which would import the compiler first (two seconds at every start):
# the calls of the libraries are nothing that torch.compile could follow.
obstacle._dynamo_marked_constant = True


@functools.cache
def _obstacle() -> str | None:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "no CUDA device"
    try:
        nvrtc_version(), _driver()
    except OSError as error:
        return f"{error}"
    return None


def nvrtc_version() -> tuple[int, int]:
    """Raises OSError where there is no NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC of torch's own CUDA: its packages lie beside torch in site-packages, or it is on the library path."""
    major = (torch.version.cuda or "0").split(".")[0]
    beside = Path(torch.__file__).parents[1] / "nvidia"
    for folder in (beside / f"cu{major}" / "lib", beside / "cuda_nvrtc" / "lib"):
        for builtins in sorted(folder.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)  # NVRTC looks for it by name
        for library in sorted(folder.glob("libnvrtc.so.*")):
            return ctypes.CDLL(str(library))
    return ctypes.CDLL("nvrtc64_120_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise CudaKernelError(f"CUDA driver: {(text.value or b'unknown error').decode()} ({status})")
