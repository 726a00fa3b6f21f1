"""The stored values of tests/reference and models filled by its rule, for the tests of this folder."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from tests import fill as rule

FOLDER = Path(__file__).resolve().parents[1] / "reference"


@cache
def stored(name: str) -> Any:
    """A JSON file, or an .npz as a dict of arrays."""
    path = FOLDER / name
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with np.load(path) as arrays:
        return {key: arrays[key] for key in arrays.files}


def image(shape: list[int] | tuple[int, ...], key: str = "input") -> Tensor:
    return rule.uniform(key, tuple(shape))


def fill(module: nn.Module, g: float = 1.5, b: float = 0.6) -> nn.Module:
    """Weights by the fill rule; returns the module in eval mode."""
    return rule.fill(module, g, b).eval()
