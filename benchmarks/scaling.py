"""Images per second of training on 1, 2, 4 ... GPUs of a machine: efficiency, memory, and what the messages cost.

    python -m benchmarks.scaling --gpus 1 2 --cfg yolov5s yolov5x-dcn --batch 16
    python -m benchmarks.scaling --gpus 1 2 --cfg yolov5s --batch 16 --data bccd.yaml         # with the loader as well
    python -m benchmarks.scaling --gpus 1 2 --cfg yolov5n --batch 2 --device cpu --imgsz 64   # gloo, two processes

Weak scaling keeps --batch images a GPU; strong scaling keeps --total images over all (default: --batch times the most
GPUs). Steps are "usual" (DDP) or "graphs" (CUDA graphs; over several GPUs with one all-reduce after the backward pass).
Efficiency is images/s over that of one GPU with the same kind of steps, times the GPUs. Every batch ends in an
optimizer step, so gradients are sent every time: training that accumulates sends less.

"resident": --batches batches that lie on the GPU, made up or, with --data, of the data set; "loader": the real one,
with --workers processes a GPU. Time is of the slowest rank, from one synchronisation to the next over --steps steps.
"messages": NCCL's kernels of rank 0 in torch.profiler, waiting for the others included; "not hidden": the part of it in
which no other kernel ran; "alone": a step of which nothing is sent, though all ranks do it at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.launch import check_files, torchrun
from benchmarks.report import cpu_name, heading, table
from utils.errors import run_cli


@dataclass(frozen=True)
class Case:
    """One measurement: model, images a GPU, kind of steps (usual, graphs), where batches come from (resident,
    loader)."""

    cfg: str
    batch: int
    step: str
    source: str


def cases(args: argparse.Namespace, gpus: int) -> list[Case]:
    """What is measured on so many GPUs: weak and strong scaling, each kind of steps; the loader at --batch only."""
    batches = dict.fromkeys([args.batch, args.total // gpus])
    found = []
    for step in args.step:
        found += [Case(cfg, batch, step, "resident") for cfg in args.cfg for batch in batches]
        found += [Case(cfg, args.batch, step, "loader") for cfg in args.cfg if args.data]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# in each of the processes


def work(args: argparse.Namespace) -> None:
    """All cases of this number of GPUs; rank 0 writes the results to --json, anew after each: one that fails leaves
    those before it."""
    import torch

    from utils.console import setup_console
    from utils.device import select_device
    from utils.dist import close_distributed, init_distributed

    world = init_distributed(cuda=args.device != "cpu")
    setup_console(False)
    device = select_device(args.device, world.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    results, link = [], link_speed(world, device, args.message_mb)
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(args, world.size):
            results.append(measure(case, args, world, device, Path(folder)))
            if world.main:
                print(json.dumps(results[-1]), flush=True)
                save(args, results, link, device)
    close_distributed(world)


def save(args: argparse.Namespace, results: list[dict[str, Any]], link: Any, device: Any) -> None:
    text = {"results": results, "link": link, "device": describe(device)}
    Path(args.json).write_text(json.dumps(text))


def describe(device: Any) -> str:
    from utils.device import describe_device

    return describe_device(device)


def measure(case: Case, args: argparse.Namespace, world: Any, device: Any, folder: Path) -> dict[str, Any]:
    """Rate, memory and messages of one case, the same in every rank."""
    import torch

    from benchmarks.train_throughput import model_and_frame
    from engine.parts import build_learner
    from utils.config import DataConfig, Hyp, TrainConfig
    from utils.dist import gather

    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    cfg = TrainConfig(
        cfg=f"{case.cfg}.yaml",
        data=args.data or "bccd.yaml",
        batch_size=case.batch * world.size,
        imgsz=args.imgsz,
        workers=args.workers,
        amp=args.amp,
        cuda_graphs="on" if case.step == "graphs" else "off",
        sync_bn=args.sync_bn,
    )
    data, hyp = DataConfig.load(cfg.data), Hyp()
    model, frame = model_and_frame(cfg, data, hyp, world, device)
    learner = build_learner(model, cfg, hyp, frame, 1000, device, world)
    learner.model.train()
    batches = Batches(case, args, cfg, data, frame, world, device, folder)
    step = stepper(learner)
    seconds = timed(step, batches.endless(), args.warmup, args.steps, world, device)
    memory = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
    sent, bare = None, None
    if world.size > 1 and case.source == "resident":
        sent = messages(step, batches.endless()) if cuda else None
        alone = timed(stepper(learner, send=False), batches.endless(), 2, args.steps // 2, world, device)
        bare = max(gather(alone, world))
    result = {
        **asdict(case),
        "gpus": world.size,
        "ms": 1000 * max(gather(seconds, world)),
        "fastest_rank_ms": 1000 * min(gather(seconds, world)),
        "memory_gb": max(gather(memory, world)),
        "messages_ms": sent[0] if sent else None,
        "not_hidden_ms": sent[1] if sent else None,
        "alone_ms": 1000 * bare if bare else None,
        "gradient_mb": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / 1e6,
    }
    result["images_per_second"] = case.batch * world.size / result["ms"] * 1000
    del learner, model, step, batches
    gc.collect()
    return result


class Batches:
    """Where a case's batches come from."""

    def __init__(self, case, args, cfg, data, frame, world, device, folder) -> None:
        from benchmarks.made_up import made_up_batch

        self.device, self.held, self.loader = device, [], None
        if not args.data:
            made = [made_up_batch(case.batch, args.imgsz, data.nc, seed=seed) for seed in range(args.batches)]
            self.held = [(b.images.to(device), b.targets.to(device)) for b in made]
            return
        self.loader = real_loader(args, cfg, data, frame, world, device, folder)
        if case.source == "resident":
            self.loader.set_epoch(0)
            self.held = [(b.images.to(device), b.targets.to(device)) for b in islice(self.loader, args.batches)]
            self.loader = None

    def endless(self) -> Iterator[tuple[Any, Any]]:
        """(images, targets) on the device, for ever."""
        from benchmarks.train_throughput import epochs_of

        if self.held:
            yield from cycle(self.held)
        for batch in epochs_of(self.loader):
            yield batch.images.to(self.device, non_blocking=True), batch.targets.to(self.device, non_blocking=True)


def real_loader(args, cfg, data, frame, world, device, folder: Path) -> Any:
    """The training loader of this rank over a list that names every image --repeat times."""
    from benchmarks.train_throughput import long_list
    from engine.parts import build_loaders
    from utils.config import Hyp
    from utils.dataset import DetectionDataset
    from utils.dist import broadcast, main_first

    folder = Path(broadcast(str(folder), world)) / str(frame.rank_batch)
    with main_first(world):
        if world.main and not folder.exists():
            folder.mkdir()
            long_list(data, args.repeat, folder)
        shared = dict(nc=data.nc, names=data.names, batch_size=frame.rank_batch, show=False)
        train = DetectionDataset([folder / "images"], frame.imgsz, hyp=Hyp(), augment=True, **shared)
        val = DetectionDataset(data.val, frame.imgsz, rect=True, **shared)
    return build_loaders(cfg, train, val, frame, world, device)[0]


def stepper(learner: Any, send: bool = True) -> Callable[[Any, Any], None]:
    """A training step: backward with its messages, then the optimizer. Without ``send`` DDP keeps its peace, and
    gradients that are shared in one go stay where they are."""
    shared = learner.shared

    def step(images: Any, targets: Any) -> None:
        learner.backward(images, targets, last=send)
        learner.shared = shared if send else None
        learner.step()
        learner.shared = shared

    return step


def timed(
    step: Callable[[Any, Any], None], batches: Iterable, warmup: int, steps: int, world: Any, device: Any
) -> float:
    """Seconds a step of this rank, over ``steps`` steps after ``warmup``; all ranks begin together."""
    import torch

    from utils.dist import gather

    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    source = iter(batches)
    for images, targets in islice(source, warmup):
        step(images, targets)
    synchronize()
    gather(None, world)
    start = time.perf_counter()
    for images, targets in islice(source, steps):
        step(images, targets)
    synchronize()
    return (time.perf_counter() - start) / steps


def messages(step: Callable[[Any, Any], None], batches: Iterable, steps: int = 5) -> tuple[float, float]:
    """Milliseconds a step of NCCL's kernels in this rank, and of that while no other kernel ran."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    source = iter(batches)
    step(*next(source))
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for images, targets in islice(source, steps):
            step(images, targets)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        sent, hidden_by = spans(json.loads(file.read_text())["traceEvents"])
    busy = union(sent)
    return total(busy) / 1000 / steps, (total(busy) - overlap(busy, union(hidden_by))) / 1000 / steps


Span = tuple[float, float]


def spans(events: Iterable[dict[str, Any]]) -> tuple[list[Span], list[Span]]:
    """(start, end) in microseconds of NCCL's kernels and of all other work on the GPU, from a profiler's trace."""
    sent, other = [], []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            span = (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
            (sent if "nccl" in event["name"].lower() else other).append(span)
    return sent, other


def union(intervals: Iterable[Span]) -> list[Span]:
    """The same time in spans that do not touch, in order."""
    joined: list[Span] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def total(intervals: Iterable[Span]) -> float:
    return sum(end - start for start, end in intervals)


def overlap(a: Sequence[Span], b: Sequence[Span]) -> float:
    """Time that both of two unions cover."""
    return total(a) + total(b) - total(union([*a, *b]))


def link_speed(world: Any, device: Any, megabytes: float, repeats: int = 10) -> dict[str, float] | None:
    """An all-reduce of so many megabytes, alone: its seconds, and bytes per second on each link of a ring."""
    import torch
    import torch.distributed as dist

    if world.size == 1:
        return None
    block = torch.ones(int(megabytes * 250_000), device=device)
    seconds = timed(lambda *_: dist.all_reduce(block), cycle([(0, 0)]), 3, repeats, world, device)
    bus = 2 * (world.size - 1) / world.size * block.numel() * 4 / seconds
    return {"megabytes": megabytes, "ms": 1000 * seconds, "bus_gb_per_second": bus / 1e9}


# ---------------------------------------------------------------------------------------------------------------------
# in the process that was started


def rows(results: Sequence[dict[str, Any]], args: argparse.Namespace) -> list[list[Any]]:
    """The table: weak scaling of every model, then strong, then with the loader."""
    found = {(r["cfg"], r["batch"], r["step"], r["source"], r["gpus"]): r for r in results}
    lines = []
    for scaling, source in (("weak", "resident"), ("strong", "resident"), ("weak", "loader")):
        for cfg in args.cfg:
            for step in args.step:
                for gpus in args.gpus:
                    batch = args.batch if scaling == "weak" else args.total // gpus
                    first = args.batch if scaling == "weak" else args.total // args.gpus[0]
                    row = found.get((cfg, batch, step, source, gpus))
                    base = found.get((cfg, first, step, source, args.gpus[0]))
                    if row and base:
                        lines.append(line(scaling, row, base))
    return lines


def line(scaling: str, row: dict[str, Any], base: dict[str, Any]) -> list[Any]:
    per_gpu = base["images_per_second"] / base["gpus"]
    efficiency = row["images_per_second"] / (per_gpu * row["gpus"])
    measured = [row["messages_ms"], row["not_hidden_ms"], row["alone_ms"]]
    return [
        row["cfg"],
        scaling,
        row["source"],
        row["step"],
        row["gpus"],
        row["batch"],
        f"{row['images_per_second']:.0f}" if row["images_per_second"] >= 100 else f"{row['images_per_second']:.1f}",
        f"{efficiency:.3f}",
        f"{row['ms']:.1f}",
        f"{row['memory_gb']:.2f}" if row["memory_gb"] else "-",
        *("-" if value is None else f"{value:.2f}" for value in measured),
    ]


HEADER = [
    "model",
    "scaling",
    "batches",
    "steps",
    "GPUs",
    "batch a GPU",
    "images/s",
    "efficiency",
    "ms a step",
    "peak GB",
]
HEADER += ["messages, ms", "not hidden, ms", "alone, ms"]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="numbers of GPUs (processes on a CPU)")
    parser.add_argument("--cfg", nargs="+", default=["yolov5s", "yolov5x-dcn"], help="models")
    parser.add_argument("--batch", type=int, default=16, help="images a GPU, weak scaling")
    parser.add_argument("--total", type=int, default=0, help="images over all GPUs, strong scaling")
    parser.add_argument("--step", nargs="+", choices=["usual", "graphs"], default=None, help="default: both on GPUs")
    parser.add_argument("--data", default="", help="a data set, for its own batches and its loader")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=16, help="how often --data is listed, so that epochs are long")
    parser.add_argument("--batches", type=int, default=4, help="batches that lie on the GPU")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--message-mb", type=float, default=100, help="size of the all-reduce that measures the link")
    parser.add_argument("--amp", default="auto")
    parser.add_argument("--sync-bn", action="store_true")
    parser.add_argument("--device", default="", choices=["", "cpu"])
    parser.add_argument("--json", default="", help="write all numbers here, for benchmarks.scaling_estimate")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.gpus = sorted(set(args.gpus))
    if args.gpus[0] < 1:
        parser.error(f"--gpus {args.gpus[0]}: at least 1")
    args.cfg = [name.removesuffix(".yaml") for name in args.cfg]
    args.step = args.step or (["usual"] if args.device == "cpu" or args.sync_bn else ["usual", "graphs"])
    args.total = args.total or args.batch * args.gpus[-1]
    uneven = [gpus for gpus in args.gpus if args.total % gpus]
    if uneven:
        parser.error(f"--total {args.total} images cannot be shared out over {uneven[0]} GPUs: give a multiple of it")
    return args


def main(argv: Sequence[str]) -> int | None:
    args = parse(argv)
    if args.worker:
        return work(args)
    check_files(args.cfg, args.data)
    gathered: dict[str, Any] = {"results": [], "link": {}, "device": "?"}
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for gpus in args.gpus:
            file = Path(folder) / f"{gpus}.json"
            own = ["-m", "benchmarks.scaling", *argv, "--worker", "--json", str(file)]
            try:
                torchrun(gpus, [*own, "--total", str(args.total)])
            except SystemExit as error:
                print(error, file=sys.stderr)
                failed = True
            if not file.is_file():
                continue
            part = json.loads(file.read_text())
            gathered["results"] += part["results"]
            gathered["link"][gpus], gathered["device"] = part["link"], part["device"]
    if not gathered["results"]:
        return 1
    if args.json:
        Path(args.json).write_text(json.dumps(gathered, indent=1))
    print("\n" + heading(f"{gathered['device']}; {cpu_name()}; {args.imgsz} px, --amp {args.amp}"))
    print(table(HEADER, rows(gathered["results"], args)))
    for gpus, link in gathered["link"].items():
        if link:
            rate = f"{link['bus_gb_per_second']:.1f} GB/s a link of a ring"
            print(f"\nAll-reduce of {link['megabytes']:g} MB over {gpus}: {link['ms']:.2f} ms, {rate}")
    if failed:
        print("some cases are missing, see above", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(run_cli(main))
