"""Boxes drawn on pictures: one picture (draw_detections) or a batch as a grid of tiles (plot_batch)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from utils.boxes import cxcywh_to_xyxy
from utils.errors import ResourceError

Colour = tuple[int, int, int]

_HEX = (
    "FF3838 FF9D97 FF701F FFB21D CFD231 48F90A 92CC17 3DDB86 1A9334 00D4BB "
    "2C99A8 00C2FF 344593 6473FF 0018EC 8438FF 520085 CB38FF FF95C8 FF37C7"
)
EAST_ASIAN = "\u2e80"
"""From here on Unicode is Chinese, Japanese and Korean, of which DejaVu Sans has nothing."""
PALETTE: tuple[Colour, ...] = tuple(tuple(bytes.fromhex(code)) for code in _HEX.split())
"""Twenty RGB colours; class c has colour c mod 20."""


def class_colour(cls: int) -> Colour:
    """The RGB colour of a class, the same in every picture."""
    return PALETTE[int(cls) % len(PALETTE)]


def draw_detections(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str],
    colours: Sequence[Colour],
    line_width: int | None = None,
    bgr: bool = False,
) -> np.ndarray:
    """A copy of ``image`` uint8 (H, W, 3) with boxes (n, 4) x1, y1, x2, y2 in its pixels, drawn in the order given.

    ``labels``: one text a box, '' for none; ``colours``: RGB, also when the image is BGR (``bgr``). ``line_width`` in
    pixels, from the picture's size by default; the text's size follows it. Labels stay inside the picture.
    """
    image = np.ascontiguousarray(image).copy()
    width = line_width or default_line_width(*image.shape[:2])
    corners = np.nan_to_num(np.asarray(boxes, np.float64).reshape(-1, 4)).clip(-1e5, 1e5).round().astype(int).tolist()
    paints = [tuple(colour[::-1]) if bgr else tuple(colour) for colour in colours]
    for (x1, y1, x2, y2), paint in zip(corners, paints):
        cv2.rectangle(image, (x1, y1), (x2, y2), paint, width)
    for (x1, y1, _, _), label, colour, paint in zip(corners, labels, colours, paints):  # no line may cross a text
        if label:
            _draw_label(image, label, (x1, y1), paint, _text_colour(colour), width)
    return image


def default_line_width(height: int, width: int) -> int:
    """Line width in pixels that suits a picture: 1 up to 300 pixels, 2 at 640 x 480, 5 at 1920 x 1080."""
    return max(1, round((height + width) / 600))


def _text_colour(background: Colour) -> Colour:
    """Black or white, whichever is easier to read on an RGB colour (luma of ITU-R BT.601)."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else (255, 255, 255)


def _draw_label(
    image: np.ndarray, text: str, corner: tuple[int, int], paint: Colour, ink: Colour, line_width: int
) -> None:
    """Text on a filled box above ``corner``, or below it at the top edge, moved so that it stays in the picture."""
    mask = _text_mask(text, max(line_width / 3, 0.4))
    height, width = min(mask.shape[0], image.shape[0]), min(mask.shape[1], image.shape[1])
    x = min(max(corner[0] - line_width // 2, 0), image.shape[1] - width)
    above = corner[1] - line_width // 2 - height
    y = min(max(above if above >= 0 else corner[1], 0), image.shape[0] - height)
    alpha = mask[:height, :width, None].astype(np.float32) / 255
    image[y : y + height, x : x + width] = (np.float32(ink) * alpha + np.float32(paint) * (1 - alpha)).round()


@lru_cache(maxsize=512)
def _text_mask(text: str, scale: float) -> np.ndarray:
    """uint8 (h, w) coverage of a text with a margin; OpenCV's font for ASCII, DejaVu Sans otherwise, and for what that
    has not OpenCV's fonts, from its version 5 on."""
    margin = max(2, round(3 * scale))
    if text.isascii():
        thickness = max(1, round(scale * 2))
        (w, h), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
        mask = np.zeros((h + base + margin, w + 2 * margin), np.uint8)
        origin = (margin, h + margin)
        cv2.putText(mask, text, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, thickness, cv2.LINE_AA)
        return mask
    size = max(9, round(30 * scale))
    if max(text) >= EAST_ASIAN and hasattr(cv2, "FontFace"):
        face = cv2.FontFace("sans")
        x, y, w, h = cv2.getTextSize((0, 0), text, (0, 0), face, size)
        mask = np.zeros((h + 2 * margin, w + 2 * margin), np.uint8)
        cv2.putText(mask, text, (margin - x, margin - y), 255, face, size)
        return mask
    font = _font(size)
    left, top, right, bottom = font.getbbox(text)
    from PIL import Image, ImageDraw

    picture = Image.new("L", (math.ceil(right - left) + 2 * margin, math.ceil(bottom - top) + 2 * margin))
    ImageDraw.Draw(picture).text((margin - left, margin - top), text, fill=255, font=font)
    return np.asarray(picture)


@lru_cache(maxsize=8)
def _font(size: int):
    """DejaVu Sans, which matplotlib brings along: Latin, Greek, Cyrillic, Arabic and more, but not Chinese.
    Without matplotlib, Pillow's own font: Latin."""
    from PIL import ImageFont

    try:
        import matplotlib
    except ImportError:
        return ImageFont.load_default(size)
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def plot_batch(
    images: Tensor,
    boxes: Tensor | Sequence[Tensor],
    paths: Sequence[str],
    names: Mapping[int, str],
    file: str | Path,
    tiles: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Write a batch as a grid of tiles, each with its file name, and return it, uint8 (H, W, 3) RGB.

    ``images`` uint8 (B, 3, H, W) RGB. ``boxes``: targets (T, 6) image index, class, cx, cy, w, h in 0..1, or one
    tensor of detections (n, 6) an image, x1, y1, x2, y2 in network pixels, confidence, class, of which those above
    0.25 are drawn. ``tiles``: :func:`batch_tiles` of the images, for who draws them more than once.
    """
    height, width = images.shape[2:]
    tiles = batch_tiles(images) if tiles is None else tiles
    tile_h, tile_w = tiles[0].shape[:2] if len(tiles) else (1, 1)
    side = math.ceil(math.sqrt(max(len(tiles), 1)))
    grid = np.full((math.ceil(len(tiles) / side) * tile_h, side * tile_w, 3), 255, np.uint8)
    for index, plain in enumerate(tiles):
        xyxy, texts, classes = _boxes_of(boxes, index, (height, width), names)
        xyxy = xyxy * np.array([tile_w / width, tile_h / height] * 2)
        line_width = default_line_width(tile_h, tile_w)
        tile, file_name = plain.copy(), Path(paths[index]).name[:40]
        _draw_label(tile, file_name, (0, 10 * tile_h), (40, 40, 40), (255, 255, 255), line_width)  # bottom left
        tile = draw_detections(tile, xyxy, texts, [class_colour(c) for c in classes], line_width)
        tile[[0, -1]], tile[:, [0, -1]] = 255, 255
        y, x = index // side * tile_h, index % side * tile_w
        grid[y : y + tile_h, x : x + tile_w] = tile
    write_image(file, grid)
    return grid


def batch_tiles(images: Tensor, max_tiles: int = 16, max_size: int = 1920) -> list[np.ndarray]:
    """The first ``max_tiles`` of uint8 images (B, 3, H, W) as (h, w, 3), so small that a square grid of them is at most
    ``max_size`` pixels wide and high."""
    images = images[:max_tiles].cpu()
    count, _, height, width = images.shape
    scale = min(1.0, max_size / (math.ceil(math.sqrt(max(count, 1))) * max(height, width)))
    size = max(1, int(width * scale)), max(1, int(height * scale))
    return [cv2.resize(image.permute(1, 2, 0).numpy(), size, interpolation=cv2.INTER_AREA) for image in images]


def _boxes_of(
    boxes: Tensor | Sequence[Tensor], index: int, size: tuple[int, int], names: Mapping[int, str]
) -> tuple[np.ndarray, list[str], list[int]]:
    """Corner boxes in network pixels, texts and classes of one image of a batch."""
    if isinstance(boxes, Tensor):
        rows = boxes[boxes[:, 0] == index].detach().float().cpu().numpy()
        height, width = size
        xyxy = cxcywh_to_xyxy(rows[:, 2:6]) * np.array([width, height, width, height])
        classes = rows[:, 1].astype(int).tolist()
        return xyxy, [names.get(c, str(c)) for c in classes], classes
    rows = boxes[index].detach().float().cpu().numpy()
    rows = rows[rows[:, 4] > 0.25][::-1]  # the most confident is drawn last, on top
    classes = rows[:, 5].astype(int).tolist()
    texts = [f"{names.get(c, str(c))} {conf:.1f}" for c, conf in zip(classes, rows[:, 4])]
    return rows[:, :4], texts, classes


def write_image(file: str | Path, image: np.ndarray, bgr: bool = False) -> None:
    """Write uint8 (H, W, 3) RGB (or BGR) in the format of the suffix. Raises ResourceError when that fails."""
    file = Path(file)
    try:
        encoded, data = cv2.imencode(file.suffix, image if bgr else cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    except cv2.error:
        encoded = False
    if not encoded:
        raise ResourceError(f"{file}: a {image.shape[1]}x{image.shape[0]} picture cannot be written as '{file.suffix}'")
    try:  # not by cv2.imwrite: it crashes on names that are not UTF-8 and does not say why a write failed
        file.write_bytes(data)
    except OSError as error:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        raise ResourceError(f"{file}: the picture cannot be written ({error.strerror}); see --project") from None
