"""Where the loader of AOTInductor packages crashes: small packages, opened in many ways, each in its own process.

    PYTHONPYCACHEPREFIX=/tmp/pyc python -m benchmarks.aoti_probe                 # on the GPU; not run there yet
    python -m benchmarks.aoti_probe --device cpu                                 # the same steps where nothing crashes

The question (torch 2.11.0+cu130, H100, 2026-11-24): packages for the GPU compile; the constructor of
AOTIModelPackageLoader then ends the process by SIGSEGV, in fresh processes and in export.py, which had just compiled
them, but not in one that had run the model eagerly on the GPU before it compiled and opened it. There was no native
stack. What the sources of that torch say, in the order in which it should be looked at:

1. **A constant that does not become a tensor.** In 2.11.0 and 2.14.1 aoti_torch_create_tensor_from_blob_v2, by which
   the constructor makes them, returns success with no tensor where the function inside it failed, and what the
   constructor does next, aoti_torch_get_data_ptr, is then a segmentation fault (seen without a GPU: a .so for CUDA
   built by hand, a made-up libcudart). Why it should fail is open. The failure says "Exception in aoti_torch" on
   stderr, as far as torch logs: the outputs of the H100 have no such line. ``tensor`` makes one outside a package;
   lines of this kind come first.
2. **The state of the process.** The one load that worked came after eager convolutions (cuDNN, cuBLAS and Triton's
   launcher loaded); the others had only made a tensor. ``warm`` against ``init`` tells; if ``warm`` works, so does a
   convolution before opening.
3. **dlopen or what follows.** The constructor unpacks to a temporary folder, dlopens the .so (RTLD_NOW, RTLD_LOCAL),
   reads a .json of extern kernels where there is one, and calls AOTInductorModelContainerCreateWithDevice. ``by
   hand`` does these one by one and says after which it died. ``empty`` is a model without constants, of which nothing
   is copied to the GPU: if that opens and the others do not, it is the constants.
4. **Whose code the .so runs.** It is linked with -lcuda and -ltorch_cuda but not -lcudart, and its names are looked
   up in what the process holds. The constructor takes the device apart with std::regex, of which libc10,
   libtorch_cpu, libtorch_cuda and libtorch_python export instances made by another g++; here it used its own, but for
   twelve static tables of libtorch_python's. ``bindings`` lists what comes from where it need not.
5. **Headers.** PyPI's CUDA 13 wheels lack crt/host_defines.h, so that what compiled there came from somewhere else;
   ``made`` says from where.

Ruled out: the CPU (a package for it, of the same torch, opens in a fresh process). That errors crash: a .so for CUDA
built by hand from such a package with g++ 12 and CUDA 13's headers is dlopened where there is no GPU, takes the CUDA
runtime from torch's libcudart.so.13, and returns status 1 with a line on stderr; no such line was seen on the H100.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.report import cpu_name, heading, table
from deploy.crash_guard import run_module, signal_name
from deploy.dcn_forms import use_dcn_form
from models.common import DCN
from utils.device import describe_device, select_device

STEPS = ("cold", "init", "warm", "single", "aoti_load_package", "tensor", "by hand", "bindings")
EXPECTED = re.compile(r"`aoti_|to \S*lib(stdc\+\+|c|m|gcc_s|gomp)\.so")
"""Bindings that need no mention."""

SHOWN = 30
"""Lines of a process that died."""

SECONDS = 90
"""For a way of opening; compiling, where other work holds the cores, took longer."""

SECONDS_TO_COMPILE = 270


def toy(kind: str, device: torch.device) -> tuple[nn.Module, Tensor]:
    """A model and its input, the same in every process. ``kind``: plain, fused, gridsample or empty (no constants)."""
    torch.manual_seed(0)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    if kind == "empty":
        return nn.SiLU(), torch.rand(2, 3, 128, 128, device=device, dtype=dtype)
    middle: nn.Module = nn.Conv2d(64, 128, 3, 2, 1)
    if kind != "plain":
        middle = DCN(64, 128, 3, 2)
        nn.init.normal_(middle.conv_offset_mask.weight, std=0.05)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.SiLU(), middle, nn.Conv2d(128, 8, 1))
    model = model.eval().requires_grad_(False).to(device, dtype)
    if kind != "plain":
        use_dcn_form(model, kind)
    return model.to(memory_format=torch.channels_last), torch.rand(2, 3, 128, 128, device=device, dtype=dtype)


def make(package: Path, device: torch.device, eager_first: bool) -> None:
    """Compile, then open in the same process, which had run the model before if ``eager_first``."""
    from torch.utils import cpp_extension  # says that there is no CUDA where there is none

    model, images = toy(package.stem.split("-")[0], device)
    print("headers of", *cpp_extension.include_paths(device.type), "CUDA_HOME", cpp_extension.CUDA_HOME, flush=True)
    begun = time.perf_counter()
    with torch.no_grad():
        if eager_first:
            model(images)
        program = torch.export.export(model, (images,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
    print(f"compiled in {time.perf_counter() - begun:.0f} s", flush=True)
    compare(open_package(package, False), package, device)


def open_package(package: Path, single: bool):
    """A function of the images."""
    loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", single, 1, -1)
    print("opened", flush=True)
    return lambda images: loader.run([images])[0]


def compare(call, package: Path, device: torch.device) -> None:
    model, images = toy(package.stem.split("-")[0], device)
    found = call(images)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("ran", flush=True)
    print(f"off by {float((found - model(images)).abs().max()):.2g}", flush=True)


def step(name: str, package: Path, device: torch.device) -> None:
    """One way to open a package, in this process."""
    if name != "cold":
        torch.zeros(1, device=device)
    if name == "warm":
        nn.functional.conv2d(*(torch.rand(2, 16, 16, 16, device=device) for _ in range(2)))
        torch.rand(64, 64, device=device) @ torch.rand(64, 64, device=device)
    if name == "tensor":
        make_tensor(device)
    elif name in ("by hand", "bindings"):
        by_hand(package, device)
    elif name == "aoti_load_package":
        compare(torch._inductor.aoti_load_package(str(package)), package, device)
    else:
        compare(open_package(package, name == "single"), package, device)


def make_tensor(device: torch.device) -> None:
    """As the constructor makes its constants; the second function hides what the first one says."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    data = torch.zeros(64, device=device)
    size, one, zero = (ctypes.c_int64 * 1)(64), (ctypes.c_int64 * 1)(1), ctypes.c_int64(0)
    kind = getattr(library, f"aoti_torch_device_type_{device.type}")()
    said = []
    for name, more in (("", ()), ("_v2", (library.aoti_torch_layout_strided(), None, zero))):
        handle = ctypes.c_void_p()
        create = getattr(library, f"aoti_torch_create_tensor_from_blob{name}")
        status = create(
            ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(1), size, one, zero, library.aoti_torch_dtype_float32(),
            kind, 0, ctypes.byref(handle), *more,
        )  # fmt: skip
        said.append(f"status {status}, {'a' if handle.value else 'no'} tensor")
    print("; ".join(said), flush=True)


def by_hand(package: Path, device: torch.device) -> None:
    """What the loader does, one by one."""
    folder = package.with_suffix(f".{os.getpid()}")
    with zipfile.ZipFile(package) as archive:
        archive.extractall(folder)
    library = next(folder.rglob("*.so"))
    print(*(f"{each.name} {each.stat().st_size}" for each in folder.rglob("*") if each.is_file()), sep="\n")
    for command in (["ldd", str(library)], ["readelf", "-d", str(library)]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            print(*(line for line in done.stdout.splitlines() if "=>" in line or "PATH" in line), sep="\n", flush=True)
        except OSError as error:
            print(error)
    print("dlopen", flush=True)
    module = ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    print("create", flush=True)
    handle, where = ctypes.c_void_p(), "cuda:0" if device.type == "cuda" else "cpu"
    create = module.AOTInductorModelContainerCreateWithDevice
    status = create(ctypes.byref(handle), ctypes.c_size_t(1), where.encode(), str(library.parent).encode())
    print(f"created: status {status}, {'a' if handle.value else 'no'} container", flush=True)


def bindings(package: Path, device: torch.device, folder: Path) -> tuple[str, str]:
    """``by hand`` under the eyes of the dynamic linker: where the .so's own symbols come from, and all of CUDA's."""
    log = folder / f"{package.stem}.ld"
    # all symbols at once: a constructor that crashes would leave the rest unbound
    watched = {"LD_DEBUG": "bindings", "LD_DEBUG_OUTPUT": str(log), "LD_BIND_NOW": ""}
    done = start("bindings", package, device, **watched)
    sources: Counter[str] = Counter()
    told = set()
    for file in folder.glob(f"{log.name}.*"):
        with file.open(errors="replace") as lines:
            for line in lines:
                head, _, symbol = line.partition(": normal symbol ")
                reader, _, source = head.partition(" to ")
                if symbol and ".wrapper.so" in reader:
                    library, name = source.split(" [")[0], symbol.split("'")[0].removeprefix("`")
                    sources[Path(library).name] += 1
                    if name.startswith("cu") or not library.endswith(".wrapper.so") and not EXPECTED.search(line):
                        told.add(f"{name} from {library}")
        file.unlink()
    found = ", ".join(f"{count} from {name}" for name, count in sources.most_common())
    return ended(done), "\n".join([f"the .so's symbols: {found or 'none seen'}", *sorted(told), *tail(done)])


def start(name: str, package: Path, device: torch.device, **variables: str) -> subprocess.CompletedProcess[str]:
    words = ["--step", name, str(package), "--device", "0" if device.type == "cuda" else "cpu"]
    limit = SECONDS_TO_COMPILE if name == "make" else SECONDS
    return run_module("benchmarks.aoti_probe", words, limit, TORCH_CPP_LOG_LEVEL="INFO", **variables)


def ended(done: subprocess.CompletedProcess[str]) -> str:
    """A cell of the table: how, and the last line that it said."""
    said = [line for line in done.stdout.splitlines() if line.strip()] or ["nothing said"]
    how = signal_name(-done.returncode) if done.returncode < 0 else f"status {done.returncode}"
    return said[-1] if done.returncode == 0 else f"**{how}** after: {said[-1]}"


def tail(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the .so and torch's part of it complained of, then the native stack or the traceback of a process that did
    not end well."""
    lines = done.stderr.splitlines()
    said = [line for line in lines if "Exception in aoti_torch" in line or line.startswith("Error: ")][:4]
    if done.returncode == 0:
        return said
    first = next((number for number, line in enumerate(lines) if line.startswith("SIG")), max(len(lines) - SHOWN, 0))
    return [line[:250] for line in (*said, *lines[first : first + SHOWN])]


def probe(device: torch.device, folder: Path) -> None:
    """Compile, then every way of opening at the same time; prints as it goes, so that a time limit leaves something."""
    kinds = ["plain", "fused" if device.type == "cuda" else "gridsample", "empty"]
    made = {f"{kind}": folder / f"{kind}.pt2" for kind in kinds}
    made[f"{kinds[1]}, run eagerly first"] = folder / f"{kinds[1]}-eager.pt2"
    details, rows = [], []
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as pool:
        jobs = {
            (name, "made and opened at once"): pool.submit(start, "make", path, device) for name, path in made.items()
        }
        for (name, how), job in jobs.items():
            rows.append([name, how, ended(job.result())])
            details += [[name, how, job.result().stdout.splitlines()[:1] + tail(job.result())]]
        print(table(["package", "process", "ended"], rows), flush=True)
        there = {name: path for name, path in made.items() if path.exists() and "eagerly" not in name}
        steps = {
            (name, each): pool.submit(start, each, path, device) for name, path in there.items() for each in STEPS[:-1]
        }
        rows = []
        for (name, how), job in steps.items():
            rows.append([name, how, ended(job.result())])
            details += [[name, how, tail(job.result())]]
            if how == "by hand":
                details[-1][2] = job.result().stdout.splitlines() + details[-1][2]
        print(table(["package", "fresh process", "ended"], rows), flush=True)
    for name, how, lines in details:
        if lines:
            print(f"\n### {name}, {how}", *lines, sep="\n", flush=True)
    for name, path in list(there.items())[:1]:
        print(f"\n### {name}, bindings", *bindings(path, device, folder), sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--step", nargs=2, default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = select_device(args.device)
    if not args.step:
        print(heading(describe_device(device) if device.type == "cuda" else cpu_name()))
        with tempfile.TemporaryDirectory() as folder:
            probe(device, Path(folder))
        return
    torch._C._set_print_stack_traces_on_fatal_signal(True)
    name, package = args.step[0], Path(args.step[1])
    if name == "make":
        make(package, device, package.stem.endswith("-eager"))
    else:
        step(name, package, device)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
