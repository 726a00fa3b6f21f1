"""A checkpoint of upstream YOLOv5, opened here without running code, beside what upstream says about it.

    python -m benchmarks.interop ../shared/interop [--images ../shared/data/bccd]

The folder holds NAME.pt and what upstream measured with it: NAME.outputs.npz (one image: raw and decoded outputs,
detections) and NAME.val.json (a validation on the CPU in float32). ``--images`` is the data set of that validation; it
is copied to a temporary folder, so that no cache is left beside it. The same is printed for the file that
``python -m models.convert`` makes of the checkpoint. Exit status 1 when a difference is above its limit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

import val
from benchmarks.report import cpu_name, heading, table
from models import load
from models.convert import convert
from models.loading import load_model

LIMITS = {"raw": 1e-3, "decoded": 1e-2, "boxes": 0.51, "confidence": 1e-3, "mAP": 5e-4}
"""Largest differences: logits, pixels of decoded boxes, of detections rounded to whole pixels, scores, and metrics to
three decimals."""
HEADER = ["what", "upstream", "here", "difference", "limit", ""]


def row(what: str, upstream: object, here: object, difference: float, limit: float) -> list[object]:
    """One line of the table."""
    return [what, upstream, here, f"{difference:.1e}", f"{limit:g}", "ok" if difference <= limit else "TOO LARGE"]


@torch.no_grad()
def one_image(weights: Path, stored: dict[str, np.ndarray]) -> list[list[object]]:
    """Raw outputs, decoded ones, and the detections at detect's defaults."""
    pixels = torch.from_numpy(stored["input_uint8_rgb_chw"])
    decoded, raw = load_model(weights, fuse=False)(pixels.float()[None] / 255)
    rows = []
    for level, name in zip(raw, ("raw_p3", "raw_p4", "raw_p5"), strict=True):
        difference = np.abs(level[0].numpy() - stored[name]).max()
        rows.append(row(f"{name}, {level[0].numel():,} logits, max", "", "", difference, LIMITS["raw"]))
    difference = np.abs(decoded[0].numpy() - stored["unfused_decoded"]).max()
    rows.append(row(f"decoded, {len(decoded[0]):,} boxes, max, pixels", "", "", difference, LIMITS["decoded"]))
    theirs = stored["detect_defaults_xyxy_conf_cls"]
    ours = load(weights, "cpu")(pixels.permute(1, 2, 0).numpy()).xyxy[0].numpy()
    if len(ours) != len(theirs) or (ours[:, 5] != theirs[:, 5]).any():
        return [*rows, row("detections at detect's defaults", len(theirs), len(ours), np.inf, 0)]
    for name, part in (("boxes", slice(4)), ("confidence", slice(4, 5))):
        difference = np.abs(ours[:, part] - theirs[:, part]).max()
        what = f"detections: {name}, max" + (" (rounded to pixels there)" if name == "boxes" else "")
        rows.append(row(what, len(theirs), len(ours), difference, LIMITS[name]))
    return rows


def validation(weights: Path, expected: dict, images: Path, folder: Path) -> list[list[object]]:
    """Metrics of val.py at its defaults on a copy of the data set."""
    data = folder / "data"
    if not data.exists():
        shutil.copytree(images, data, ignore=shutil.ignore_patterns("*.npz"), copy_function=shutil.copyfile)
    metrics = val.run(weights=weights, data=data / "data.yaml", device="cpu", noplots=True, project=folder / "runs")
    per_class = metrics.per_class
    rows = [("P", expected["P"], metrics.p), ("R", expected["R"], metrics.r)]
    rows += [("mAP50", expected["mAP50"], metrics.map50), ("mAP50-95", expected["mAP50_95"], metrics.map)]
    for index, number in enumerate(per_class.classes):
        theirs, ap = expected["per_class"][str(number)], per_class.ap[index]
        for name, ours in (("AP50", ap[0]), ("AP75", ap[5]), ("AP50_95", ap.mean())):
            rows.append((f"class {number}: {name}", theirs[name], ours))
    return [row(what, f"{a:.5f}", f"{b:.5f}", abs(a - b), LIMITS["mAP"]) for what, a, b in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=Path, help="data set of the validation (default: FOLDER/../data/bccd)")
    args = parser.parse_args()
    failed = False
    print(heading(cpu_name()))
    for weights in sorted(args.folder.glob("*.pt")):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            ours = folder / "ours.pt"
            print(convert(weights, ours), "\n")
            stored = dict(np.load(weights.with_suffix(".outputs.npz")))
            expected = json.loads(weights.with_suffix(".val.json").read_text())
            images = args.images or args.folder.parent / "data" / "bccd"
            for name, path in ((weights.name, weights), ("the converted file", ours)):
                rows = one_image(path, stored) + validation(path, expected, images, folder)
                print(f"{name}:\n\n{table(HEADER, rows)}\n")
                failed |= any(line[-1] != "ok" for line in rows)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
