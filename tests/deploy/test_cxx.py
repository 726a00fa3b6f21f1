"""Packages of AOTInductor share the C++ library of the process, whatever the compiler does by itself."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from deploy import cxx
from deploy.run_torch import _check_library
from utils.errors import ExportError

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
STATIC = 'case " $* " in *" -shared "*) exec g++ "$@" -static-libstdc++ ;; *) exec g++ "$@" ;; esac'
"""A compiler that puts a copy of the library into what it links."""


@pytest.fixture
def use_compiler(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a shell script the compiler of AOTInductor."""
    from torch._inductor import config

    compiler = tmp_path / "g++"

    def use(body: str) -> Path:
        compiler.write_text(f"#!/bin/sh\n{body}\n")
        compiler.chmod(0o700)
        return compiler

    with config.patch({"cpp.cxx": (None, str(compiler))}):
        yield use


def test_a_compiler_that_shares_is_left_alone() -> None:
    with cxx.shared_cxx_library() as settings:
        assert settings == {}


def test_a_compiler_that_copies_the_library(use_compiler: Callable[[str], Path], tmp_path: Path) -> None:
    compiler = use_compiler(STATIC)
    with cxx.shared_cxx_library() as settings:
        _, instead = settings["cpp.cxx"]
        assert not cxx._shares(str(compiler), tmp_path) and cxx._shares(instead, tmp_path)
    assert not Path(instead).exists()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (STATIC, "puts a copy of the C.* library .* CXX=clang"),
        ('case " $* " in *" -shared "*) echo "no space left" >&2; exit 1 ;; esac', "g.. does not work: no space left"),
    ],
)
def test_a_compiler_that_does_not_serve(
    body: str, says: str, use_compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compiler(body)
    monkeypatch.setattr(cxx, "_loaded_library", lambda: "-lm")  # of no help
    with pytest.raises(ExportError, match=says), cxx.shared_cxx_library():
        pass


def test_no_compiler(use_compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ExportError, match="install g"), cxx.shared_cxx_library():
        pass


def test_cxx_names_no_compiler(use_compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/nothing")
    with pytest.raises(ExportError, match="CXX=/bin/nothing is no compiler"), cxx.shared_cxx_library():
        pass


def test_a_compiler_that_writes_nothing(use_compiler: Callable[[str], Path]) -> None:
    compiler = use_compiler("exit 0")
    with pytest.raises(ExportError, match="does not work: exit status 0"), cxx.shared_cxx_library():
        pass
    compiler.unlink()  # torch remembers it
    with pytest.raises(ExportError, match="does not work: .*No such file"), cxx.shared_cxx_library():
        pass


@pytest.mark.parametrize("inside", [b"\x7fELF...libstdc++.so.6\x00...", b"\x7fELF" + bytes(3 << 20)])
def test_a_package_with_a_library_of_its_own_is_refused(inside: bytes, tmp_path: Path) -> None:
    package = tmp_path / "best.pt2"
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("best/data/aotinductor/model/wrapper.so", inside)
    shared = b"libstdc++" in inside
    with nullcontext() if shared else pytest.raises(ExportError, match=r"best\.pt2: has a C\+\+ library of its own"):
        _check_library(package)


def test_the_name_may_lie_across_two_reads() -> None:
    text = bytes((1 << 20) - 5) + b"libstdc++.so.6"
    assert not cxx.has_own_cxx_library(io.BytesIO(text)) and cxx.has_own_cxx_library(io.BytesIO(text[:-8]))
