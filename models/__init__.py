"""The network, and the way to use it from Python: ``from models import load``."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.api import Detector


def load(weights: str | Path | list[str | Path], device: str = "", half: bool = False, **settings: Any) -> Detector:
    """Open a checkpoint for detection; see :func:`models.api.load`, which this calls.

    torch is imported here and not at the top, so that importing the package costs nothing.
    """
    from models.api import load as open_detector

    return open_detector(weights, device, half, **settings)


class _Package(ModuleType):
    """Keeps ``models.load`` the function: Python binds a submodule, here models/load.py, to its name in the package
    when it is first imported, which would replace it. ``from models.load import ...`` is not affected."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "load" or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
