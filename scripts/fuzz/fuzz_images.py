"""Pictures: mutated small files of every kind, read as a whole and by their headers."""

from __future__ import annotations

import io
import random

import cv2
import numpy as np
from PIL import Image

from scripts.fuzz.rounds import Counts, mutate, run_round
from utils.images import decode_image, parse_header

WORDS = [
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\xff\xff\xff\xfftEXt",
    b"\xff\xd8",
    b"\xff\xd9",
    b"\xff\xc0",
    b"\xff\xda",
    b"IHDR",
    b"IDAT",
]
WORDS += [
    b"IEND",
    b"eXIf",
    b"Exif\0\0",
    b"II*\0",
    b"MM\0*",
    b"BM",
    b"RIFF",
    b"WEBPVP8 ",
    b"VP8X",
    b"GIF89a",
    b"Pf\n",
    b"P6\n",
    b"%!PS",
]
MAX_PIXELS = 1_000_000  # of the inputs: they come from pictures of 24 x 20


def _corpus() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    files = [cv2.imencode(suffix, pixels)[1].tobytes() for suffix in (".jpg", ".png", ".bmp", ".tif", ".webp", ".ppm")]
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "TIFF", "WEBP", "GIF"):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, kind, exif=exif) if kind != "GIF" else Image.fromarray(pixels).save(out, kind)
        files.append(out.getvalue())
    return files


def run(inputs: int, seed: int) -> Counts:
    """Read ``inputs`` mutated pictures."""
    corpus = _corpus()

    def make(rng: random.Random) -> bytes:
        return mutate(rng, corpus, WORDS)

    return run_round(make, _attempt, inputs, seed)


def _attempt(data: bytes) -> None:
    header = parse_header(data, "a.jpg")
    image = decode_image(data, "a.jpg", MAX_PIXELS)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, image.shape
    assert image.shape[0] * image.shape[1] <= MAX_PIXELS, (header, image.shape)
