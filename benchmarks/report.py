"""What all benchmarks share: the heading that says where and when, and a Markdown table."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import date


def heading(device: str) -> str:
    """Command, date, device and versions: a number without them is not a measurement."""
    import cv2
    import numpy
    import torch
    import torchvision

    versions = f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    versions += f", numpy {numpy.__version__}, OpenCV {cv2.__version__}"
    module = sys.argv[0].removesuffix("/__main__.py").rsplit("/", 1)[-1].removesuffix(".py")
    command = shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]])
    return f"`{command}`, {date.today().isoformat()}, {device}\n{versions}\n"


def cpu_name() -> str:
    """The processor's model and the cores this process may use."""
    from utils.cores import available_cores

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or 'CPU'}, {available_cores()} cores"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats with three significant digits."""

    def cell(value: object) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [header, ["---"] * len(header), *[[cell(v) for v in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def slope(xs: Sequence[float], ys: Sequence[float]) -> str:
    """The exponent of ys ~ xs ** exponent."""
    import numpy as np

    return f"{np.polyfit(np.log(xs), np.log(ys), 1)[0].round(2) + 0.0:.2f}" if len(xs) > 1 and min(ys) > 0 else "-"
