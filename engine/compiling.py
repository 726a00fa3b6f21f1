"""--compile: the model and the loss of a training step through torch.compile.

Compiled is one shape, that of the first batch; an epoch's smaller last batch runs as usual, because a second
compilation takes as long as the first and would pay back sixty times slower. CUDA graphs record what was compiled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engine.graphs import pad_targets
from utils.console import LOGGER
from utils.errors import ConfigError, ResourceError, is_installed
from utils.loss import LossParts

WAY_OUT = "or leave --compile out"


def check_compiler(device: torch.device) -> None:
    """Raise ResourceError when torch would find no compiler on this machine; ConfigError for a device without one."""
    if device.type == "mps":
        raise ConfigError("--compile: for CUDA devices and CPUs; leave it out")
    if device.type == "cuda" and not is_installed("triton"):
        raise ResourceError(f"--compile: torch needs Triton for a GPU: pip install triton, {WAY_OUT}")
    variable, usual = ("CC", ("gcc", "clang", "cc")) if device.type == "cuda" else ("CXX", ("g++",))
    names = [os.environ[variable]] if os.environ.get(variable) else usual
    if not any(map(_answers, names)):
        missing = " or ".join(names) + (f" that answers ({variable})" if os.environ.get(variable) else "")
        raise ResourceError(f"--compile: torch needs a compiler and finds no {missing}: install it, {WAY_OUT}")


def _answers(compiler: str) -> bool:
    """Whether it is there and says its version, which is what torch asks."""
    if not shutil.which(compiler):
        return False
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, check=False, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class CompiledStep:
    """``model``, to train in the place of the one given, whose weights and modules it shares; ``loss``: (raw, targets)
    -> LossParts, in the place of ``criterion``. Steps run inside :meth:`step`."""

    def __init__(self, model: nn.Module, criterion: Callable[[Sequence[Tensor], Tensor], LossParts]) -> None:
        self.model = _FirstShape(model)
        self._criterion, self._compiled = criterion, torch.compile(criterion)
        self._shape: torch.Size | None = None
        self._begun = False

    def loss(self, raw: Sequence[Tensor], targets: Tensor) -> LossParts:
        """The criterion's, of few shapes: targets (T, 6) are filled up with rows that match nothing."""
        self._shape = self._shape or raw[0].shape
        if raw[0].shape != self._shape:
            return self._criterion(raw, targets)
        return self._compiled(raw, pad_targets(targets))

    @contextmanager
    def step(self, usual: bool = False) -> Iterator[None]:
        """Forward, loss and backward of a batch go in here; the first says how long it took. ``usual``: as if nothing
        were compiled, for hooks to see. Raises ResourceError when torch cannot compile."""
        if usual:
            with torch.compiler.set_stance("force_eager"):
                yield
            return
        first, self._begun, start = not self._begun, True, time.perf_counter()
        if first:
            LOGGER.info("--compile: compiling the training step, which takes a minute or two ...")
        try:
            yield
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ResourceError(
                f"--compile: torch cannot compile this model ({reason}); leave --compile out"
            ) from error
        if first:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            LOGGER.info(f"--compile: compiling took {time.perf_counter() - start:.1f} s")


class _FirstShape(nn.Module):
    """Compiled for the first input's shape. The model's name inside is that of torch's own wrapper, which
    utils.ema.unwrap knows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model
        self._compiled = (torch.compile(model, dynamic=False),)  # in a tuple: no second owner of the parameters
        self._shape: torch.Size | None = None

    def forward(self, images: Tensor) -> list[Tensor]:
        self._shape = self._shape or images.shape
        return (self._compiled[0] if images.shape == self._shape else self._orig_mod)(images)
