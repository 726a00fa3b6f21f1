"""Make data/bccd, the bundled demo set, from the blood-cell set in YOLO form.

    python scripts/make_bccd.py SOURCE data/bccd

SOURCE has images/{train,val,test} and labels/ likewise. Pictures are scaled to a longest side of 416 pixels and saved
as JPEG of quality 85; labels are copied, being fractions of the image. The result is the same on every run.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere

import cv2  # noqa: E402

from utils.errors import run_cli  # noqa: E402
from utils.files import atomic_write  # noqa: E402
from utils.images import list_images, read_image  # noqa: E402
from utils.labels import label_path  # noqa: E402


def shrink(source: Path, target: Path, side: int, quality: int) -> None:
    """Write one picture, its longest side at most ``side`` pixels, as JPEG."""
    image = read_image(source)
    h, w = image.shape[:2]
    ratio = min(1.0, side / max(h, w))
    image = cv2.resize(image, (round(w * ratio), round(h * ratio)), interpolation=cv2.INTER_AREA)
    settings = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    atomic_write(target, cv2.imencode(".jpg", image[..., ::-1], settings)[1].tobytes())


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of the original set")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--side", type=int, default=416, help="longest side in pixels (416)")
    parser.add_argument("--quality", type=int, default=85, help="JPEG quality (85)")
    args = parser.parse_args(argv)
    total = 0
    for path in map(Path, list_images(args.source / "images")):
        picture = (args.target / path.relative_to(args.source)).with_suffix(".jpg")
        label = args.target / Path(label_path(path)).relative_to(args.source)
        for folder in (picture.parent, label.parent):
            folder.mkdir(parents=True, exist_ok=True)
        shrink(path, picture, args.side, args.quality)
        shutil.copyfile(label_path(path), label)
        total += picture.stat().st_size + label.stat().st_size
    print(f"{args.target}: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
