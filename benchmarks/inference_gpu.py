"""val.py and detect.py on a GPU as a user runs them: milliseconds an image, models replayed as CUDA graphs and not.

    python -m benchmarks.inference_gpu --data bccd.yaml --weights yolov5s=best.pt --repeats 3
    python -m benchmarks.inference_gpu --data bccd.yaml --weights yolov5s=best.pt --one-process    # as upstream's were

Whole runs in processes of their own on --images pictures (those of the split, listed again), half precision. "an
image" is what more pictures cost: the difference of a run on all of them and one on a quarter of them, over the
difference of their numbers; the whole run, start included, is beside it. Upstream on an H100 (1640 images for val, 72
for detect in its second run in a process, yolov5s): 8.0 and 5.9 for val, its start included, 21.9 for detect with
pictures and 11.7 without. The limit is the forward pass alone, replayed.

--one-process: upstream's figures are of runs inside one process, without the start of Python and torch: val's of the
first run on 1640 images, detect's of the second on 72. So are these: all repeats in one process, the first one beside
the others, and the ratio where upstream has the same run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.forward import forward_ms
from benchmarks.report import cpu_name, heading, table
from models.loading import load_model
from utils.config import DataConfig
from utils.device import describe_device, select_device
from utils.errors import SPINS, run_cli

ROOT = Path(__file__).resolve().parents[1]
UPSTREAM = {"val": 8.0, "detect --nosave": 11.7, "detect": 21.9}
LIKE_UPSTREAM = {"val": (1640, "first"), "detect --nosave": (72, "later"), "detect": (72, "later")}


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


def flags_of(what: str, weights: str, yaml: Path, graphs: str, device: str, folder: str) -> list[str]:
    """The script and its flags."""
    script, *flags = what.split()
    source = ["--data", str(yaml)] if script == "val" else ["--source", str(yaml.parent / "images")]
    half = ["--half"] if device != "cpu" else []
    common = ["--weights", weights, "--cuda-graphs", graphs, "--project", folder, "--device", device]
    return [script, *common, *source, *flags, *half]


def run(command: Sequence[str]) -> str:
    """What a process printed; SystemExit with its last words when it failed."""
    # what the scripts set before torch is loaded (utils.errors), as --inside has it loaded by then
    env = {SPINS[0]: SPINS[1], **os.environ}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:].rstrip())
    return done.stdout


def seconds(what: str, weights: str, yaml: Path, graphs: str, device: str) -> tuple[float, str]:
    """Wall seconds of a whole run, and what it printed of mAP or speed."""
    with tempfile.TemporaryDirectory() as folder:
        script, *flags = flags_of(what, weights, yaml, graphs, device, folder)
        start = time.perf_counter()
        printed = run([f"{script}.py", *flags])
        took = time.perf_counter() - start
    table_row = re.search(r"^\s+all\s.*$", printed, re.MULTILINE)
    speed = re.search(r"Speed: (.*) per image", printed)
    told = f"{table_row.group().split()[-1] if table_row else '-'}; {speed.group(1) if speed else ''}"
    print(f"{what}, graphs {graphs}, {yaml.parent.name} images: {took:.2f} s; {told}", file=sys.stderr, flush=True)
    return took, told


def inside(times: int, script: str, flags: Sequence[str]) -> None:
    """Run a script so often in this process, and print the seconds of each run as the last line."""
    took = []
    for _ in range(times):
        start = time.perf_counter()
        if status := run_cli(importlib.import_module(script).main, flags):
            sys.exit(status)
        took.append(time.perf_counter() - start)
    print(json.dumps(took))


def one_process(args: argparse.Namespace, yamls: dict[int, Path]) -> list[list]:
    """Rows of the table of --one-process."""
    rows = []
    for name, file in args.weights:
        for what in args.runs:
            for count, yaml in yamls.items():
                with tempfile.TemporaryDirectory() as folder:
                    flags = flags_of(what, file, yaml, "auto", args.device, folder)
                    printed = run(["-m", "benchmarks.inference_gpu", "--inside", str(args.repeats + 1), *flags])
                first, *later = (1000 * s / count for s in json.loads(printed.splitlines()[-1]))
                middle = statistics.median(later)
                spread = f"{min(later):.2f} to {max(later):.2f}"
                same = {(count, "first"): first, (count, "later"): middle}.get(LIKE_UPSTREAM[what])
                then = (UPSTREAM[what], UPSTREAM[what] / same) if same else ("-", "-")
                rows.append([name, what, count, first, middle, spread, *then])
                print(*rows[-1], file=sys.stderr, flush=True)
    return rows


def own_processes(args: argparse.Namespace, yamls: dict[int, Path], device: torch.device) -> tuple[list, list[str]]:
    """Rows of the usual table, and what the runs and the forward pass alone said."""
    rows, said = [], []
    few, most = yamls
    for name, file in args.weights:
        for what in args.runs:
            for graphs in ("on", "off") if device.type == "cuda" else ("off",):
                took = {n: [seconds(what, file, yaml, graphs, args.device) for _ in range(args.repeats)]
                        for n, yaml in yamls.items()}  # fmt: skip
                low, high = (min(s for s, _ in took[n]) for n in yamls)
                whole = [1000 * s / most for s, _ in took[most]]
                each, middle = 1000 * (high - low) / (most - few), statistics.median(whole)
                spread, then = f"{min(whole):.2f} to {max(whole):.2f}", UPSTREAM[what]
                rows.append([name, what, graphs, each, middle, spread, then, then / middle])
                said.append(f"{name}, {what}, graphs {graphs}: mAP50-95 {took[most][-1][1]}")
        if device.type == "cuda":
            model = load_model(file, device).half()
            one, many = (forward_ms(model, batch, (512, 640), device) / batch for batch in (1, 32))
            said.append(f"{name}: forward alone {one:.3f} ms an image at batch 1, {many:.3f} at 32")
    return rows, said


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="bccd.yaml")
    parser.add_argument("--weights", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--images", type=int, default=1640)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--runs", nargs="+", choices=list(UPSTREAM), default=list(UPSTREAM), help="default: all")
    parser.add_argument("--one-process", action="store_true", help="whole runs in one process, as upstream's were")
    parser.add_argument("--device", default="")
    args = parser.parse_args(argv)
    if wrong := [item for item in args.weights if not item.partition("=")[2]]:
        parser.error(f"--weights {wrong[0]}: write NAME=FILE")
    args.weights = [(name, str(Path(file).resolve())) for name, _, file in (w.partition("=") for w in args.weights)]
    if args.images < 2 or args.repeats < 1:
        parser.error(f"--images {args.images}, --repeats {args.repeats}: at least 2 and 1")
    return args


def main(argv: Sequence[str]) -> None:
    if argv[:1] == ["--inside"]:
        return inside(int(argv[1]), argv[2], argv[3:])
    args = parse_args(argv)
    device, data = select_device(args.device), DataConfig.load(args.data)
    few = min(72, args.images - 1) if args.one_process else max(args.images // 4, 1)
    with tempfile.TemporaryDirectory() as folder:
        yamls = {count: many_images(data, count, Path(folder) / str(count)) for count in (few, args.images)}
        if args.one_process:
            names = ["model", "run", "images", "first run, ms an image", "later runs", "spread", "upstream", "ratio"]
            rows, said = one_process(args, yamls), []
        else:
            names = ["model", "run", "graphs", "ms an image", "whole run, ms an image", "spread", "upstream", "ratio"]
            rows, said = own_processes(args, yamls, device)
    print(heading(f"{describe_device(device)}; {cpu_name()}"))
    print(table(names, rows))
    print("\n".join(["", *said]))


if __name__ == "__main__":
    sys.exit(run_cli(main))
