"""What 8, 64 and 512 GPUs should give, on paper: from a measured step, the size of the gradients and the links.

    python -m benchmarks.scaling_estimate --measured scaling.json                       # written by benchmarks.scaling
    python -m benchmarks.scaling_estimate --step-ms 130 --gradient-mb 346 --name yolov5x-dcn

Not a measurement. The step of N GPUs is taken to be

    step of one GPU + what the slowest of N adds + the part of the messages that the backward pass does not hide

An all-reduce takes 2 (N - 1) / N times the gradients over the slowest link, and the latencies of its hops. Within a
host the link is NVLink. Between hosts NCCL builds as many rings as there are network cards, each with its share of the
gradients, so the cards of a host add up; for latency its trees count: along the GPUs of a host, then log2 of the hosts,
up and down. Every assumption is printed with its number, and each has a flag.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.report import table


@dataclass(frozen=True)
class Assumptions:
    """Speeds in GB/s (1e9 bytes), times as named. The defaults are an HGX H200 host's data sheet, discounted."""

    gpus_a_host: int = 8
    cards_a_host: int = 8
    nvlink: float = 320.0
    network: float = 40.0
    nvlink_latency_us: float = 4.0
    network_latency_us: float = 12.0
    bucket_mb: float = 25.0
    backward_share: float = 0.6
    slowdown: float = 0.03
    spread: float = 0.02

    def lines(self) -> list[list[str]]:
        """Name, number and reason of each."""
        return [
            ["GPUs a host, network cards a host", f"{self.gpus_a_host}, {self.cards_a_host}", "HGX H200, a card a GPU"],
            [
                "NVLink, a link of a ring",
                f"{self.nvlink:g} GB/s",
                "450 GB/s each way by data sheet, 70 % of it reached",
            ],
            [
                "network, a card",
                f"{self.network:g} GB/s",
                "InfiniBand NDR, 400 Gb/s = 50 GB/s, 80 % of it reached",
            ],
            [
                "latency of a hop in a host",
                f"{self.nvlink_latency_us:g} us",
                "one NCCL step over NVLink, order of size",
            ],
            ["latency of a hop between hosts", f"{self.network_latency_us:g} us", "RDMA and a switch, order of size"],
            ["bucket", f"{self.bucket_mb:g} MB", "DDP's own size; the last bucket waits for the whole backward pass"],
            [
                "backward pass",
                f"{self.backward_share:.0%} of a step",
                "twice the forward pass, the optimizer beside it",
            ],
            ["sending slows computing by", f"{self.slowdown:.0%}", "NCCL's kernels take some of the processors"],
            ["steps differ by (one sigma)", f"{self.spread:.0%}", "loaders, clocks; the slowest of N sets the pace"],
        ]


@dataclass(frozen=True)
class Model:
    """What was measured: a step of one GPU (ms, ``batch`` images) and the gradients (MB) that are sent for it. With
    ``one_message`` all of them go after the backward pass, as where steps are CUDA graphs."""

    name: str
    batch: int
    step_ms: float
    gradient_mb: float
    one_message: bool = False


def reduce_ms(megabytes: float, gpus: int, a: Assumptions) -> float:
    """An all-reduce of so many megabytes over all GPUs."""
    if gpus == 1:
        return 0.0
    hosts = math.ceil(gpus / a.gpus_a_host)
    speed = a.nvlink if hosts == 1 else min(a.nvlink, a.network * a.cards_a_host)
    hops_inside, hops_between = 2 * (min(gpus, a.gpus_a_host) - 1), 2 * math.ceil(math.log2(hosts))
    latency = (hops_inside * a.nvlink_latency_us + hops_between * a.network_latency_us) / 1000
    return 2 * (gpus - 1) / gpus * megabytes / speed + latency


def straggling(gpus: int, a: Assumptions) -> float:
    """By how much the slowest of N exceeds the mean, as a share: sigma sqrt(2 ln N), the extreme of normal values."""
    return a.spread * math.sqrt(2 * math.log(gpus)) if gpus > 1 else 0.0


def estimate(model: Model, gpus: int, a: Assumptions) -> dict[str, float]:
    """ms of the messages, of their part that shows, of the whole step; efficiency."""
    if gpus == 1:
        return {"messages": 0.0, "shows": 0.0, "step": model.step_ms, "efficiency": 1.0}
    bucket = model.gradient_mb if model.one_message else min(a.bucket_mb, model.gradient_mb)
    count = math.ceil(model.gradient_mb / bucket)
    each = reduce_ms(model.gradient_mb / count, gpus, a)
    backward = model.step_ms * a.backward_share
    # a bucket goes when its share of the backward pass is over, and after the one before it
    ready = sent = 0.0
    for index in range(1, count + 1):
        ready = backward * index / count
        sent = max(sent, ready) + each
    shows = sent - backward
    slowed = 0.0 if model.one_message else a.slowdown * min(count * each, backward)
    step = model.step_ms * (1 + straggling(gpus, a)) + slowed + shows
    return {"messages": count * each, "shows": shows, "step": step, "efficiency": model.step_ms / step}


def measured_models(file: Path) -> list[Model]:
    """The one-GPU cases of benchmarks.scaling's --json that have their batches on the GPU."""
    results = json.loads(file.read_text())["results"]
    return [
        Model(r["cfg"], r["batch"], r["ms"], r["gradient_mb"], r["step"] == "graphs")
        for r in results
        if r["gpus"] == 1 and r["source"] == "resident"
    ]


def with_measured_link(a: Assumptions, file: Path) -> tuple[Assumptions, str]:
    """NVLink's speed as the all-reduce of most GPUs found it."""
    links = {int(gpus): link for gpus, link in json.loads(file.read_text())["link"].items() if link}
    if not links:
        return a, ""
    speed = links[max(links)]["bus_gb_per_second"]
    return replace(a, nvlink=speed), f"{speed:.0f} GB/s: measured, all-reduce over {max(links)} GPUs"


HEADER = ["model", "batch a GPU", "messages", "GPUs", "messages, ms", "that shows, ms", "step, ms", "efficiency"]


def rows(models: Sequence[Model], gpus: Sequence[int], a: Assumptions) -> list[list[Any]]:
    lines = []
    for model in models:
        kind = "one, after the backward pass" if model.one_message else "buckets, during it"
        for count in gpus:
            e = estimate(model, count, a)
            times = [f"{e[name]:.2f}" for name in ("messages", "shows", "step")]
            lines.append([model.name, model.batch, kind, count, *times, f"{e['efficiency']:.3f}"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", default="", metavar="JSON", help="what benchmarks.scaling --json wrote")
    parser.add_argument("--name", default="model")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--step-ms", type=float, default=0.0, help="a step of one GPU")
    parser.add_argument("--gradient-mb", type=float, default=0.0, help="float32 gradients: four bytes a parameter")
    parser.add_argument("--gpus", type=int, nargs="+", default=[2, 4, 8, 64, 512])
    defaults = Assumptions()
    for name, value in vars(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=None, metavar="X")
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in vars(defaults) if getattr(args, name) is not None}
    a, link = replace(defaults, **given), ""
    if args.measured:
        models = measured_models(Path(args.measured))
        if args.nvlink is None:
            a, link = with_measured_link(a, Path(args.measured))
    elif args.step_ms > 0 and args.gradient_mb > 0:
        models = [Model(args.name, args.batch, args.step_ms, args.gradient_mb, False)]
        models.append(replace(models[0], one_message=True))
    else:
        parser.error("give --measured, or --step-ms and --gradient-mb")
    print("An estimate, not a measurement. Assumptions:\n")
    lines = a.lines()
    if link:
        lines[1][1:] = link.split(": ", 1)
    print(table(["what", "number", "why"], lines) + "\n")
    print(table(HEADER, rows(models, args.gpus, a)))


if __name__ == "__main__":
    main()
