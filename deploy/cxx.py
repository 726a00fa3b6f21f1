"""The C++ compiler that AOTInductor calls, made to share the C++ library of the process.

A compiler that finds no libstdc++.so, but a libstdc++.a, or that is told -static-libstdc++, puts a copy of the library
into every package. Two copies in one process number the parts of a locale each in its own way, so that the first
regular expression in a package's constructor, which takes the name of the device apart, ends in a segmentation fault
or std::bad_cast: on the CPU as on a GPU, whatever the model (torch 2.11 and 2.14, GCC 12 and 13).
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from utils.errors import ExportError

NAMES = (b"libstdc++.so", b"libc++.so")
SOURCE = "#include <string>\nstd::string text(int number) { return std::to_string(number); }\n"
SCRIPT = """#!/bin/sh
case " $* " in
  *" -shared "*) exec {compiler} "$@" -x none {library} ;;
  *) exec {compiler} "$@" ;;
esac
"""
"""Named before the compiler's own choice, the process's library gives all symbols, and none is left for the copy."""


@contextmanager
def shared_cxx_library() -> Iterator[dict[str, object]]:
    """Settings of AOTInductor with which packages have no C++ library of their own; none where that is so anyway.

    Raises ExportError where the compiler is missing or does not compile, or puts a copy in all the same.
    """
    compiler = _compiler()
    with tempfile.TemporaryDirectory(prefix="cxx-") as folder:
        if _shares(compiler, Path(folder)):
            yield {}
            return
        script, library = Path(folder) / "g++", _loaded_library()
        script.write_text(SCRIPT.format(compiler=shlex.join(shlex.split(compiler)), library=shlex.quote(library)))
        script.chmod(0o700)
        if not _shares(str(script), Path(folder)):
            raise ExportError(
                f"--include aoti: {compiler} puts a copy of the C++ library into what it links, and a package with one "
                "crashes when it is opened; name another compiler: CXX=clang++"
            )
        yield {"cpp.cxx": (None, str(script))}


def has_own_cxx_library(library: IO[bytes]) -> bool:
    """Whether a shared library, open at its beginning, brings its C++ library along instead of naming the system's."""
    before = b""
    while part := library.read(1 << 20):
        if any(name in before + part for name in NAMES):
            return False
        before = part[-max(map(len, NAMES)) :]
    return True


def _compiler() -> str:
    """As AOTInductor chooses it; a command, perhaps of several words."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except Exception as error:  # torch._inductor.exc.InvalidCxxCompiler, which has moved between versions
        given = os.environ.get("CXX")
        do = f"CXX={given} is no compiler that answers" if given else "install g++ (Debian: apt install g++)"
        raise ExportError(f"--include aoti: compiles C++; {do}") from error


def _shares(compiler: str, folder: Path) -> bool:
    source, library = folder / "text.cpp", folder / "text.so"
    source.write_text(SOURCE)
    command = [*shlex.split(compiler), "-shared", "-fPIC", str(source), "-o", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        works = done.returncode == 0 and library.is_file()
    except OSError as error:
        said, works = str(error), False
    if not works:
        raise ExportError(f"--include aoti: the C++ compiler {compiler} does not work: {said[:200]}")
    with library.open("rb") as file:
        return not has_own_cxx_library(file)


def _loaded_library() -> str:
    """The file of the C++ library that torch has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/libstdc++.so" in line:
            return line.split(maxsplit=5)[-1]
    raise ExportError("--include aoti: this build of torch does not use libstdc++.so")
