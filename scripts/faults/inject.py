"""Runs a script of this repository with a fault built in: python -m scripts.faults.inject kill-in-save:2 train.py ...

Each fault strikes where no signal from outside could be timed to: in the middle of a write, at a certain step.
``1@gpu-memory``: in rank 1 only, and in torchrun's first start only.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.errors import run_cli

STRUCK = "DCN_FAULT_STRUCK"
"""Environment variable: a file whose time says when the fault struck."""


def kill() -> None:
    """End this process as the kernel's out-of-memory killer would."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, action: Callable[..., Any]) -> None:
    """Let ``action(*args, **options)`` run before the ``number``-th call of ``owner.name``; 0: before every call."""
    original, calls = getattr(owner, name), []

    def wrapper(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if number in (0, len(calls)):
            if STRUCK in os.environ and len(calls) == max(number, 1):
                Path(os.environ[STRUCK]).touch()
            action(*args, **options)
        return original(*args, **options)

    setattr(owner, name, wrapper)


def at_step(number: str | int, action: Callable[..., Any]) -> None:
    """:func:`at_call` of the ``number``-th training step; ``action`` is given the learner."""
    at_call(importlib.import_module("engine.epoch").Learner, "backward", int(number), action)


def half_written(writer: Callable[..., None]) -> Callable[..., None]:
    """The first half of what ``writer`` writes, brought to the disk, and then the kill."""

    def action(*args: Any, **options: Any) -> None:
        file = next(arg for arg in args if hasattr(arg, "write"))
        whole = io.BytesIO()
        writer(*(whole if arg is file else arg for arg in args), **options)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.fsync(file.fileno())
        kill()

    return action


def kill_in_save(number: str) -> None:
    """In the middle of the ``number``-th checkpoint (best.pt and last.pt count one each)."""
    at_call(torch, "save", int(number), half_written(torch.save))


def kill_in_cache(_: str) -> None:
    """In the middle of the labels cache."""
    at_call(np, "savez", 1, half_written(np.savez))


def kill_before_rename(argument: str) -> None:
    """When the N-th checkpoint ("2"), or file of another ending ("1,.onnx"), is complete under its temporary name."""
    number, _, suffix = argument.partition(",")
    suffix = suffix or ".pt"
    real, seen = os.replace, []

    def replace(source: str, target: str | Path) -> None:
        seen.extend([1] * str(target).endswith(suffix))
        if len(seen) == int(number) and str(target).endswith(suffix):
            kill()
        real(source, target)

    os.replace = replace


def kill_before_last(number: str) -> None:
    """When best.pt of the ``number``-th epoch is written and last.pt is not."""
    at_call(importlib.import_module("engine.run"), "save_last", int(number), lambda *_, **__: kill())


def kill_a_worker(number: str) -> None:
    """At the ``number``-th step, a loader process."""

    def action(*_: Any, **__: Any) -> None:
        import psutil

        for child in psutil.Process().children()[:1]:
            child.kill()

    at_step(number, action)


def kill_at_step(number: str) -> None:
    """At the ``number``-th step, this process."""
    at_step(number, lambda *_, **__: kill())


def stop(number: str) -> None:
    """At the ``number``-th step the process is stopped, as a debugger or a machine that swaps would."""
    at_step(number, lambda *_, **__: os.kill(os.getpid(), signal.SIGSTOP))


def hang_gpu(number: str) -> None:
    """Before the ``number``-th step, the GPU is given something to do that takes about an hour."""
    at_step(number, lambda *_, **__: torch.cuda._sleep(7 * 10**12))


def stall(number: str) -> None:
    """The ``number``-th batch does not come, as from storage that no longer answers."""
    loader = importlib.import_module("utils.dataloaders").DetectionLoader
    at_call(loader, "_taken_out", int(number), lambda *_, **__: time.sleep(3600))


def nan(number: str) -> None:
    """Before the ``number``-th step (0: before every one), in a weight of layer 3."""

    def action(learner: Any, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            learner.model.model[3].conv.weight[0, 0, 0, 0] = float("nan")

    at_step(number, action)


def no_memory(_: str) -> None:
    """Before the first step the address space is limited to what is taken and 100 MB more."""

    def action(*_: Any, **__: Any) -> None:
        import resource

        import psutil

        most = psutil.Process().memory_info().vms + 100_000_000
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    at_step(1, action)


def gpu_memory(_: str) -> None:
    """More than any GPU has is asked for at the second step; on a CPU, the error of CUDA's allocator is imitated."""

    def action(learner: Any, *_: Any, **__: Any) -> None:
        if learner.device.type == "cuda":
            torch.empty(2**50, dtype=torch.uint8, device=learner.device)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    at_step(2, action)


def vanish(folder: str) -> None:
    """Between the scan and the first epoch one image is removed and another cut short."""

    def action(*_: Any, **__: Any) -> None:
        first, second, *_rest = sorted(Path(folder).iterdir())
        first.unlink()
        second.write_bytes(second.read_bytes()[:1000])

    at_call(importlib.import_module("engine.trainer"), "build_loaders", 1, action)


def impatient(seconds: str) -> None:
    """A lost stream is given up after this time instead of a minute."""
    streams = importlib.import_module("utils.streams")
    streams.StreamReader.__init__.__defaults__ = (1, float(seconds), *streams.StreamReader.__init__.__defaults__[2:])
    streams.StreamSource.__init__.__defaults__ = (1, float(seconds), *streams.StreamSource.__init__.__defaults__[2:])


FAULTS: dict[str, Callable[[str], None]] = {
    "kill-in-save": kill_in_save,
    "kill-in-cache": kill_in_cache,
    "kill-before-rename": kill_before_rename,
    "kill-before-last": kill_before_last,
    "kill-a-worker": kill_a_worker,
    "kill": kill_at_step,
    "stop": stop,
    "hang-gpu": hang_gpu,
    "stall": stall,
    "nan": nan,
    "no-memory": no_memory,
    "gpu-memory": gpu_memory,
    "vanish": vanish,
    "impatient": impatient,
}


def main() -> int:
    """Install the fault, then be the script."""
    fault, script, *flags = sys.argv[1:]
    rank, _, fault = fault.rpartition("@")
    name, _, argument = fault.partition(":")
    if not rank or (rank == os.environ.get("RANK") and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"):
        FAULTS[name](argument)
    return run_cli(importlib.import_module(script.removesuffix(".py")).main, flags)


if __name__ == "__main__":
    sys.exit(main())
