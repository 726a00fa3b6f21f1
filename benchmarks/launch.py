"""Start a module of this repository in several processes, as a person would with torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from models.spec import read_spec
from utils.config import DataConfig
from utils.files import ROOT

NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""NVLink multicast off: on some shared hosts a program that uses it puts the GPUs out of service."""


def check_files(cfgs: Sequence[str], data: str) -> None:
    """ConfigError or DataError, before any process is started, for a model ("yolov5s") or a dataset YAML ("": none)
    that is not there or faulty."""
    for name in cfgs:
        read_spec(f"{name}.yaml")
    if data:
        DataConfig.load(data)


def launcher(processes: int) -> list[str]:
    """torchrun for so many processes of this machine; its other flags and the target follow."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def environment() -> dict[str, str]:
    """For processes that import this repository from any folder, and leave NVLink multicast alone."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"OMP_NUM_THREADS": "1", **os.environ, **NO_MULTICAST, "PYTHONPATH": path}


def torchrun(processes: int, target: Sequence[str], quiet: bool = False) -> str:
    """Run ``target`` (a script with its flags, or ``-m module flags``) in so many processes of this machine and return
    its output, which is also shown unless ``quiet``. SystemExit with its last lines when it fails."""
    lines: list[str] = []
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen([*launcher(processes), *target], env=environment(), **pipes) as process:
        for line in process.stdout:
            lines.append(line)
            if not quiet:
                print(line, end="", flush=True)
    if process.returncode:
        raise SystemExit(
            f"torchrun with {processes} processes ended with {process.returncode}:\n{''.join(lines[-30:])}"
        )
    return "".join(lines)
