"""--visualize: what each layer of the model puts out, as a picture of up to 32 feature maps and as numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor, nn

from utils.errors import ConfigError
from utils.plots import write_image

MAX_MAPS, COLUMNS, GAP = 32, 8, 2
MIN_SIDE = 48  # pixels; small maps are enlarged to be seen


@contextmanager
def record_features(model: nn.Module) -> Iterator[dict[str, np.ndarray]]:
    """While open, each layer's output for the first image of a forward lands in the yielded dict.

    Keys are ``stage0_Conv``, ``stage1_C3``, ... ; values float32 (C, H, W). Layers without a (B, C, H, W) output or
    with 1 x 1 maps are left out. Raises ConfigError for a model that is no sequence of layers (an ensemble).
    """
    layers = getattr(model, "model", None)
    if not isinstance(layers, nn.Sequential):
        raise ConfigError("--visualize: shows the layers of one model; give a single --weights file")
    features: dict[str, np.ndarray] = {}

    def keep(name: str):
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
                features[name] = output[0].detach().float().cpu().numpy()

        return hook

    handles = [layer.register_forward_hook(keep(f"stage{i}_{type(layer).__name__}")) for i, layer in enumerate(layers)]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def save_features(features: dict[str, np.ndarray], folder: Path) -> None:
    """Write NAME_features.png and NAME_features.npy for each recorded layer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, maps in features.items():
        write_image(folder / f"{name}_features.png", feature_grid(maps))
        np.save(folder / f"{name}_features.npy", maps)


def feature_grid(maps: np.ndarray) -> np.ndarray:
    """(C, H, W) float -> uint8 RGB grid, 8 a row, of the first 32 maps, each stretched over its own range."""
    tiles = [_tile(m) for m in maps[:MAX_MAPS]]
    rows = -(-len(tiles) // COLUMNS)
    height, width = tiles[0].shape[:2]
    grid = np.full((rows * (height + GAP) - GAP, min(len(tiles), COLUMNS) * (width + GAP) - GAP, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // COLUMNS * (height + GAP), i % COLUMNS * (width + GAP)
        grid[y : y + height, x : x + width] = tile
    return grid


def _tile(values: np.ndarray) -> np.ndarray:
    values = np.nan_to_num(values)
    low, high = float(values.min()), float(values.max())
    scaled = (255 * (values - low) / max(high - low, 1e-12)).astype(np.uint8)
    factor = max(1, -(-MIN_SIDE // min(values.shape)))
    scaled = cv2.resize(scaled, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    return cv2.cvtColor(cv2.applyColorMap(scaled, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
