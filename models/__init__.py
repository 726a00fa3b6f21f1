"""The network, and the way to use it from Python: ``from models import load``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.api import Detector


def load(weights: str | Path | list[str | Path], device: str = "", half: bool = False, **settings: Any) -> Detector:
    """Open a checkpoint for detection; see :func:`models.api.load`, which this calls.

    torch is imported here and not at the top, so that importing the package costs nothing.
    """
    from models.api import load as open_detector

    return open_detector(weights, device, half, **settings)
