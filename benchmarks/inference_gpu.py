"""val.py and detect.py on a GPU as a user runs them: milliseconds an image, models replayed as CUDA graphs and not.

    python -m benchmarks.inference_gpu --data bccd.yaml --weights yolov5s=best.pt --repeats 3

Whole runs in processes of their own on --images pictures (those of the split, listed again), half precision. "an
image" is what more pictures cost: the difference of a run on all of them and one on a quarter of them, over the
difference of their numbers; the whole run, start included, is beside it. Upstream on an H100 (1640 images for val, 72
for detect in its second run in a process, yolov5s): 8.0 and 5.9 for val, its start included, 21.9 for detect with
pictures and 11.7 without. The limit is the forward pass alone, replayed.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.forward import forward_ms
from benchmarks.report import cpu_name, heading, table
from models.loading import load_model
from utils.config import DataConfig
from utils.device import describe_device, select_device
from utils.errors import run_cli

ROOT = Path(__file__).resolve().parents[1]
UPSTREAM = {"val": 8.0, "detect --nosave": 11.7, "detect": 21.9}


def many_images(data: DataConfig, count: int, folder: Path) -> Path:
    """A data set YAML whose val split has ``count`` images: links to those of ``data``, again and again."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    sources = sorted(path for split in data.val for path in split.rglob("*") if path.is_file())
    for number in range(count):
        image = sources[number % len(sources)]
        label = Path(str(image).replace("/images/", "/labels/")).with_suffix(".txt")
        (folder / "images" / f"{number}{image.suffix}").symlink_to(image)
        if label.is_file():
            (folder / "labels" / f"{number}.txt").symlink_to(label)
    yaml = folder / "data.yaml"
    yaml.write_text(f"train: images\nval: images\nnames: {list(data.names.values())}\n", encoding="utf-8")
    return yaml


def seconds(what: str, weights: str, yaml: Path, graphs: str, device: str) -> tuple[float, str]:
    """Wall seconds of a whole run, and what it printed of mAP or speed."""
    script, *flags = what.split()
    source = ["--data", str(yaml)] if script == "val" else ["--source", str(yaml.parent / "images")]
    half = ["--half"] if device != "cpu" else []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, f"{script}.py", "--weights", weights, "--cuda-graphs", graphs, "--project", folder]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, *source, *flags, *half, "--device", device],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        took = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr[-2000:].rstrip())
    table_row = re.search(r"^\s+all\s.*$", done.stdout, re.MULTILINE)
    speed = re.search(r"Speed: (.*) per image", done.stdout)
    told = f"{table_row.group().split()[-1] if table_row else '-'}; {speed.group(1) if speed else ''}"
    print(f"{what}, graphs {graphs}, {yaml.parent.name} images: {took:.2f} s; {told}", file=sys.stderr, flush=True)
    return took, told


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--weights", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--images", type=int, default=1640)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--runs", nargs="+", choices=list(UPSTREAM), default=list(UPSTREAM), help="default: all")
    parser.add_argument("--device", default="")
    args = parser.parse_args(argv)
    if wrong := [item for item in args.weights if not item.partition("=")[2]]:
        parser.error(f"--weights {wrong[0]}: write NAME=FILE")
    if args.images < 2 or args.repeats < 1:
        parser.error(f"--images {args.images}, --repeats {args.repeats}: at least 2 and 1")
    device, data = select_device(args.device), DataConfig.load(args.data)
    few = max(args.images // 4, 1)
    rows, said = [], []
    with tempfile.TemporaryDirectory() as folder:
        yamls = {count: many_images(data, count, Path(folder) / str(count)) for count in (few, args.images)}
        for item in args.weights:
            name, file = item.split("=", 1)
            file = str(Path(file).resolve())
            for what in args.runs:
                for graphs in ("on", "off") if device.type == "cuda" else ("off",):
                    took = {n: [seconds(what, file, yaml, graphs, args.device) for _ in range(args.repeats)]
                            for n, yaml in yamls.items()}  # fmt: skip
                    low, high = (min(s for s, _ in took[n]) for n in (few, args.images))
                    whole = [1000 * s / args.images for s, _ in took[args.images]]
                    each = 1000 * (high - low) / (args.images - few)
                    spread = f"{min(whole):.2f} to {max(whole):.2f}"
                    then = UPSTREAM[what]
                    middle = statistics.median(whole)
                    rows.append([name, what, graphs, each, middle, spread, then, then / middle])
                    said.append(f"{name}, {what}, graphs {graphs}: mAP50-95 {took[args.images][-1][1]}")
            if device.type == "cuda":
                model = load_model(file, device).half()
                one, many = (forward_ms(model, batch, (512, 640), device) / batch for batch in (1, 32))
                said.append(f"{name}: forward alone {one:.3f} ms an image at batch 1, {many:.3f} at 32")
    print(heading(f"{describe_device(device)}; {cpu_name()}"))
    print(
        table(["model", "run", "graphs", "ms an image", "whole run, ms an image", "spread", "upstream", "ratio"], rows)
    )
    print("\n" + "\n".join(said))


if __name__ == "__main__":
    sys.exit(run_cli(main))
