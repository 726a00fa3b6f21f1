"""Whether opening a compiled package ends the process that does it, found out in a process of its own.

A package of AOTInductor is machine code that its loader runs at once. On one machine (torch 2.11, H100) every package
for the GPU ended the process with a segmentation fault, which nothing in Python can catch.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.errors import ExportError
from utils.files import ROOT

TRIAL = "deploy.trial"
"""The module that opens the package and runs it once."""

MAX_SECONDS = 300


def may_crash(device: torch.device) -> bool:
    """Whether packages for such a device are tried first; it takes some seconds. None for the CPU has crashed."""
    return device.type == "cuda"


@dataclass(frozen=True)
class Trial:
    """How a process that opened a package fared. ``grief``, in words: a signal ended it, or the time limit; ``error``:
    the last line of one that ended with an error of its own. Both empty: it went well."""

    grief: str = ""
    error: str = ""


def refuse_what_crashes(path: Path, device: torch.device) -> None:
    """Raise ExportError for a package that ends the process it is opened in. An error of another kind is left to who
    opens it next. Tried once for a file, torch and GPU: a trial that went well is remembered in the user's cache."""
    passed = _memory_of(path, device)
    if not passed.exists() and (grief := try_package(path, device).grief):
        raise ExportError(f"{path}: {grief}; run the checkpoint, or a file of --include onnx or torchscript")


def try_package(path: Path, device: torch.device, *files: Path) -> Trial:
    """Open the package in another process and run it once, on nothing, or from one .npy of ``files`` to the other."""
    done = run_module(TRIAL, list(map(str, (path, device, *files))), MAX_SECONDS)
    if done.returncode == 0:
        _remember(_memory_of(path, device))
        return Trial()
    if told := how_it_ended(done.returncode):
        return Trial(grief=f"{told} (torch {torch.__version__})")
    line = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return Trial(error=line.removeprefix("error: ")[:300])


def run_module(module: str, words: Sequence[str], seconds: float, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python -m module words`` of this repository in the caller's folder, with environment ``variables``. Status 124:
    it took longer than that."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}
    command = [sys.executable, "-m", module, *words]
    try:
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        texts = [
            each.decode(errors="replace") if isinstance(each, bytes) else each for each in (late.stdout, late.stderr)
        ]
        return subprocess.CompletedProcess(command, 124, *(each or "" for each in texts))


def _text(given: str | bytes | None) -> str:
    return given.decode(errors="replace") if isinstance(given, bytes) else given or ""


def how_it_ended(status: int) -> str:
    """In words, where a signal or the time limit ended a trial; else empty."""
    if status == 124:
        return f"a process that opened it was not done in {MAX_SECONDS} s"
    if status >= 0:
        return ""
    return f"a process that opened it was ended by {signal_name(-status)}"


def signal_name(number: int) -> str:
    """``SIGSEGV``; ``signal 60`` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _memory_of(path: Path, device: torch.device) -> Path:
    """An empty file that is there once the package was opened well. A rename keeps it, anything else that counts does
    not: the file itself, torch, GPU, driver."""
    stat = path.stat()
    facts = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, torch.__version__, str(device)]
    if device.type == "cuda":
        facts += [torch.cuda.get_device_name(device), torch._C._cuda_getDriverVersion()]
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dcn-yolov5" / "opened" / hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _remember(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError:
        pass  # it is tried again next time
