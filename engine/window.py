"""--view-img: a window that shows each annotated frame."""

from __future__ import annotations

import os
import sys

import cv2
import numpy as np

from utils.errors import ConfigError


class Window:
    """Shows frames in one window per source. Raises ConfigError at once where no window can be opened."""

    def __init__(self) -> None:
        # Without a display some OpenCV builds abort the whole process instead of raising, so this is asked first.
        if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise ConfigError("--view-img: there is no display here (DISPLAY is not set); leave the flag out")
        try:
            cv2.namedWindow("detect.py", cv2.WINDOW_NORMAL)
            cv2.destroyWindow("detect.py")
        except cv2.error:
            raise ConfigError(
                "--view-img: this OpenCV has no windows; pip uninstall opencv-python-headless, then "
                "pip install opencv-python"
            ) from None

    def show(self, name: str, image: np.ndarray) -> bool:
        """Show uint8 (H, W, 3) RGB; True when the user pressed q."""
        cv2.imshow(name, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        return cv2.waitKey(1) & 0xFF == ord("q")

    def close(self) -> None:
        """Close all windows of this program."""
        cv2.destroyAllWindows()
