"""The device, the seeds and the precision of a run. Everything here is called from main, nothing at import."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from utils.console import LOGGER
from utils.errors import ConfigError

MOST_THREADS = 4
"""Of torch's work on the CPU beside a GPU, see :func:`few_threads`."""

AMP_CHOICES = ("auto", "bf16", "fp16", "off")


def select_device(request: str = "", local_rank: int = 0) -> torch.device:
    """The device for ``--device``: '' (first GPU, else CPU), 'cpu', 'mps', '0', 'cuda:0' or '0,1' under torchrun.

    With several numbers, process ``local_rank`` takes its own. Raises ConfigError when the device is not there.
    """
    request = str(request).strip().lower().replace("cuda:", "")
    if request in ("cpu", "none"):
        return torch.device("cpu")
    if request == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("--device mps: this machine or this build of torch has no MPS; use --device cpu")
        return torch.device("mps")
    if request in ("", "cuda"):
        return torch.device(f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    numbers = [part.strip() for part in request.split(",") if part.strip()]
    if not all(part.isdigit() for part in numbers) or not numbers:
        raise ConfigError(f"--device {request}: expected cpu, mps, 0 or 0,1,...")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    missing = [n for n in numbers if int(n) >= count]
    if missing:
        raise ConfigError(
            f"--device {request}: there are {count} CUDA devices here; use --device cpu or a number below"
        )
    if len(numbers) > 1 and "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            f"--device {request}: several GPUs need one process each: "
            f"torchrun --nproc_per_node {len(numbers)} train.py --device {request} ..."
        )
    return torch.device(f"cuda:{numbers[local_rank % len(numbers)]}")


def describe_device(device: torch.device) -> str:
    """``CUDA:0 (NVIDIA H100 80GB HBM3, 81079MiB)`` or ``CPU``."""
    if device.type != "cuda":
        return device.type.upper()
    properties = torch.cuda.get_device_properties(device)
    return f"CUDA:{device.index or 0} ({properties.name}, {properties.total_memory // 2**20}MiB)"


@contextmanager
def few_threads(device: torch.device) -> Iterator[None]:
    """Inside, torch's work on the CPU uses up to MOST_THREADS threads if the model runs on a GPU.

    What is left to the CPU then is small, and by default every piece of it waits for as many threads as there are
    cores, on which loader processes and helpers run. ``OMP_NUM_THREADS``, where it is set, stays.
    """
    usual = torch.get_num_threads()
    if device.type == "cuda" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(usual, MOST_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed random, numpy and torch. ``deterministic`` asks torch for repeatable kernels (slower; warns, where an op
    has none, rather than failing: the reference DCN's CUDA backward is such an op)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling fresh memory with NaN would feed NaN offsets to kernels during profiling; nothing of ours reads it.
        torch.utils.deterministic.fill_uninitialized_memory = False
    if torch.cuda.is_available():
        torch.backends.cudnn.deterministic = deterministic
        torch.backends.cudnn.benchmark = (
            False  # measured on an H100: no faster in channels-last order, 4 to 20 s to start
        )


def amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype for ``--amp auto|bf16|fp16|off``; None means float32 throughout.

    auto: bf16 on GPUs that have it natively (compute capability 8.0 and up), fp16 on older ones, off on the CPU.
    Raises ConfigError for fp16 on the CPU.
    """
    if choice not in AMP_CHOICES:
        raise ConfigError(f"--amp {choice}: choose one of {', '.join(AMP_CHOICES)}")
    if choice == "off":
        return None
    if device.type == "cpu":
        if choice == "fp16":
            raise ConfigError("--amp fp16: CPUs train in bf16 or float32; use --amp bf16 or --amp off")
        return torch.bfloat16 if choice == "bf16" else None
    if device.type != "cuda":
        return torch.float16 if choice in ("auto", "fp16") else torch.bfloat16
    native_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    if choice == "bf16" and not native_bf16:
        raise ConfigError("--amp bf16: this GPU has no native bfloat16; use --amp fp16")
    return torch.float16 if choice == "fp16" or not native_bf16 else torch.bfloat16


def half_dtype(requested: bool, device: torch.device, exported: bool = False) -> torch.dtype | None:
    """What inference computes in: with ``--half`` float16 on CUDA, and bfloat16 on a CPU that multiplies it and for
    checkpoints (``exported`` files have their own dtype inside); else None, float32, after one warning where half
    precision was requested."""
    if not requested:
        return None
    if device.type == "cuda":
        return torch.float16
    if device.type == "cpu" and not exported and cpu_has_bfloat16():
        return torch.bfloat16
    why = "an exported file keeps its own precision" if exported else f"no fast half precision on this {device.type}"
    LOGGER.warning(f"--half: {why}; running in float32")
    return None


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products (AMX, AVX512-BF16) and torch can tell; without them
    bfloat16 is slower than float32."""
    tell = getattr(torch.cpu, "get_capabilities", None)  # not in older releases
    found = tell() if tell else {}
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def graphs_allowed(choice: str, device: torch.device, obstacle: str = "") -> bool:
    """Whether ``--cuda-graphs auto|on|off`` leads to graphs: by default on a CUDA device without another
    ``obstacle`` (in words). ConfigError where they cannot be and were asked for."""
    if device.type != "cuda":
        obstacle = f"they need a CUDA device, not {device.type}"
    if obstacle and choice == "on":
        raise ConfigError(f"--cuda-graphs on: {obstacle}")
    return not obstacle and choice != "off"


def to_network_input(images: torch.Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 (B, 3, H, W) on any device -> ``dtype`` in 0..1 on ``device``, channels last on CUDA (cuDNN's fast order).

    The bytes travel, a quarter of the floats; a pinned batch is copied while the device works.
    """
    images = images.to(device, non_blocking=True)
    if device.type == "cuda":
        images = images.contiguous(memory_format=torch.channels_last)
    return images.to(dtype).div_(255)


def memory_gb(device: torch.device) -> float:
    """Reserved GPU memory in units of 1e9 bytes (what the progress bar shows); 0 on the CPU."""
    return torch.cuda.memory_reserved(device) / 1e9 if device.type == "cuda" else 0.0
