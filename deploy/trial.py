"""Open a package and run it once: ``python -m deploy.trial best.pt2 cuda:0 [images.npy output.npy]``. For
deploy/crash_guard.py: this process may end by a signal."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from deploy.run_torch import AotiRuntime
from utils.errors import run_cli


def main(argv: Sequence[str]) -> int:
    """Returns 0. Raises ExportError, ConfigError for a package that cannot be opened."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core file where it crashes
    path, device = Path(argv[0]), torch.device(argv[1])
    runtime = AotiRuntime(path, device, tried=True)
    meta, files = runtime.meta, argv[2:]
    if files:
        images = torch.from_numpy(np.load(files[0]))
    else:
        images = torch.zeros(meta.batch, 3, *meta.imgsz, dtype=torch.float16 if meta.half else torch.float32)
    output = runtime.run(images).cpu().numpy()  # waits for the GPU
    if files:
        np.save(files[1], output)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
