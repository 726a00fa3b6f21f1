"""The TensorRT plugin on a GPU, without an engine: is it right, and what does it cost beside a plain convolution.

    python -m deploy.tensorrt.plugin -o libdcnv2.so --weights yolov5x-dcn.yaml
    python -m benchmarks.plugin --plugin libdcnv2.so --tensorrt libnvinfer_dispatch.so.11

TensorRT's own registry (of the package tensorrt-dispatch-cu13-libs, or any libnvinfer.so.11) loads the library and
creates the plugin, whose fields are serialised and given to the creator again; that object is attached to a context
(none), told its shapes and enqueued on a stream, for tensors of torch's. Each case stands alone: an error is a row.

Layers: 3x3, stride 2, as yolov5x-dcn has them at 640 pixels, offsets independent at every pixel. channels-last is
TensorRT's HWC8 (HWC in float32); linear is turned in the workspace. Times: medians of replays of a CUDA graph, ms.
conv: plain cuDNN in channels-last order, tuned. op: the fused forward of training. torchvision: its op in float32.
Errors: relative L2 distance to torchvision's op in float64 on the same rounded inputs.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from benchmarks.report import heading, table
from deploy.tensorrt.plugin.build import PluginOptions, build_library
from deploy.tensorrt.plugin.harness import HWC, HWC8, LINEAR, Harness, Plugin, Settings, Shapes, build_harness
from models.ops.deform_conv import deform_conv2d
from models.ops.geometry import Geometry
from utils.device import describe_device

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LIMITS = {"fp32": 1e-5, "fp16": 5e-4, "bf16": 4e-3}
"""Relative error of the output."""


@dataclass(frozen=True)
class Case:
    """A layer and the ``side``s (rows, columns) of its input."""

    channels: int
    outputs: int
    side: tuple[int, int]
    settings: Settings
    kernel: tuple[int, int] = (3, 3)
    batch: int = 2
    bias: bool = True

    def __str__(self) -> str:
        (rows, columns), (kh, kw), s = self.side, self.kernel, self.settings
        steps = " ".join(f"{a}{b}x{c}" for a, (b, c) in zip("spd", (s.stride, s.padding, s.dilation)))
        groups = f"g{s.groups[0]} og{s.offset_groups[0]}"
        bias = "" if self.bias else " no bias"
        return f"{self.channels}->{self.outputs} @{rows}x{columns} k{kh}x{kw} {steps} {groups}{bias}"


LAYERS = tuple(Case(c, 2 * c, (side, side), Settings((2, 2), (1, 1))) for c, side in ((80, 320), (160, 160), (320, 80)))
CASES = (
    Case(3, 5, (17, 23), Settings((1, 1), (1, 1))),
    Case(8, 16, (33, 30), Settings((2, 1), (0, 2)), bias=False),
    Case(64, 96, (40, 24), Settings((1, 1), (1, 1), groups=(2,), offset_groups=(4,))),
    Case(24, 40, (40, 24), Settings((1, 1), (2, 2), groups=(4,), offset_groups=(2,)), (5, 5), 3),
    Case(48, 32, (25, 31), Settings((3, 2), (2, 4), (2, 3), offset_groups=(3,)), (3, 5)),
    Case(320, 640, (12, 12), Settings((1, 1), (0, 0)), (1, 1), 1),
    Case(16, 1000, (9, 7), Settings((1, 1), (1, 1)), (3, 3), 1),
    Case(32, 64, (1, 1), Settings((1, 1), (1, 1)), (3, 3), 5),
)


@dataclass
class Runner:
    """A plugin object as an engine holds it, and what it is enqueued with."""

    plugin: Plugin
    shapes: Shapes
    inputs: list[Tensor]
    out: Tensor
    workspace: Tensor

    def __call__(self) -> Tensor:
        if not self.plugin.enqueue(self.shapes, self.inputs, self.out, self.workspace):
            raise RuntimeError("enqueue failed")
        return self.out


def runner(harness: Harness, settings: Settings, inputs: Sequence[Tensor], channels_last: bool) -> Runner:
    """Through build phase, serialised fields, runtime phase and context, to a Runner. The order of the inputs is the
    plugin's. Raises RuntimeError naming the step that failed."""
    x, offset, _, weight, *_ = inputs
    dtype = x.dtype
    order = torch.channels_last if channels_last else torch.contiguous_format
    format = (HWC if dtype == torch.float32 else HWC8) if channels_last else LINEAR
    shape = (len(x), len(weight), *offset.shape[2:])
    shapes = Shapes.of([tuple(tensor.shape) for tensor in inputs], shape, dtype, format)
    built = harness.create(settings)
    if not built.configure(shapes):
        raise RuntimeError("configurePlugin failed")
    size = built.workspace_bytes(shapes)
    plugin = harness.recreate(built).attached()
    if plugin.serialized() != built.serialized():
        raise RuntimeError("fields differ after the round trip")
    if not plugin.shape_change(shapes):
        raise RuntimeError("onShapeChange failed")
    ordered = [x.contiguous(memory_format=order), *(tensor.contiguous() for tensor in inputs[1:])]
    out = torch.full(shape, math.nan, dtype=dtype, device=x.device).contiguous(memory_format=order)
    workspace = torch.full((max(1, size),), 0xFF, dtype=torch.uint8, device=x.device)  # NaN: what is not written shows
    return Runner(plugin, shapes, ordered, out, workspace)


def exact(settings: Settings, inputs: Sequence[Tensor]) -> Tensor:
    """In float64, image by image: its columns are large."""
    x, offset, mask, weight, *bias = (tensor.detach().double() for tensor in inputs)
    steps = (settings.stride, settings.padding, settings.dilation)
    images = zip(x.split(1), offset.split(1), mask.split(1))
    parts = [torchvision.ops.deform_conv2d(i, o, weight, *(bias or [None]), *steps, mask=m) for i, o, m in images]
    return torch.cat(parts)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def verdict(value: float, dtype: str) -> str:
    return f"{value:.1e}" + ("" if value <= LIMITS[dtype] else " TOO LARGE")


def random_inputs(case: Case, dtype: torch.dtype, spread: float = 1.5, device: str = "cuda") -> list[Tensor]:
    """In the plugin's order; ``spread``: standard deviation of the offsets in pixels."""
    generator = torch.Generator(device).manual_seed(0)
    s, (kh, kw) = case.settings, case.kernel
    taps = s.offset_groups[0] * kh * kw
    sides = zip(case.side, case.kernel, s.stride, s.padding, s.dilation)
    out = tuple((side + 2 * p - d * (k - 1) - 1) // stride + 1 for side, k, stride, p, d in sides)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    group = case.channels // s.groups[0]
    tensors = [
        normal(case.batch, case.channels, *case.side),
        normal(case.batch, 2 * taps, *out) * spread,
        torch.rand((case.batch, taps, *out), generator=generator, device=device),
        normal(case.outputs, group, kh, kw) / math.sqrt(group * kh * kw),
    ]
    tensors += [normal(case.outputs)] if case.bias else []
    return [tensor.to(dtype) for tensor in tensors]


def check_rows(harness: Harness, types: Sequence[str]) -> Iterator[list]:
    for case, name in product(CASES, types):
        row = [str(case), case.batch, name]
        inputs = random_inputs(case, DTYPES[name])
        expected = exact(case.settings, inputs)
        for channels_last in (False, True):
            eights = case.channels % 8 == 0 and case.outputs % 8 == 0
            if channels_last and not (eights or name == "fp32"):
                row.append("-")
                continue
            run = attempt(runner, harness, case.settings, inputs, channels_last)
            found = attempt(run) if isinstance(run, Runner) else run
            row.append(verdict(error(found, expected), name) if isinstance(found, Tensor) else found)
        yield row


def attempt(function: Callable, *arguments) -> object:
    """The result, or the error's text."""
    try:
        result = function(*arguments)
        torch.cuda.synchronize()
        return result
    except Exception as problem:  # one case must not end the others
        return f"{type(problem).__name__}: {problem}".splitlines()[0][:120]


def bench(function: Callable[[], object]) -> float:
    """Median ms of replays of one CUDA graph."""
    import triton

    return triton.testing.do_bench_cudagraph(function, rep=20, return_mode="median")


def rivals(inputs: Sequence[Tensor]) -> list[object]:
    """ms of the plain convolution and training's kernel, channels-last, and of torchvision in float32."""
    x, offset, mask, weight, bias = (
        each.contiguous(memory_format=torch.channels_last) if each.dim() == 4 else each for each in inputs
    )
    wide = [each.float().contiguous() for each in inputs]
    return [
        attempt(bench, lambda: F.conv2d(x, weight, bias, 2, 1)),
        attempt(bench, lambda: deform_conv2d(x, offset, mask, weight, bias, 2, 1, backend="triton")),
        attempt(bench, lambda: torchvision.ops.deform_conv2d(*wide[:2], *wide[3:], 2, 1, mask=wide[2])),
    ]


@torch.no_grad()
def layer_rows(harnesses: dict[str, Harness], args: argparse.Namespace) -> Iterator[list]:
    for layer, batch, dtype in product(LAYERS, args.batch, args.dtype):
        inputs = random_inputs(replace(layer, batch=batch), DTYPES[dtype], args.spread)
        expected, beside = exact(layer.settings, inputs), rivals(inputs)
        for (name, harness), channels_last in product(harnesses.items(), (True, False)):
            row = [str(layer), batch, dtype, name, "channels-last" if channels_last else "linear"]
            run = attempt(runner, harness, layer.settings, inputs, channels_last)
            found = attempt(run) if isinstance(run, Runner) else run
            if not isinstance(found, Tensor):
                yield [*row, found]
                continue
            wrong, took = verdict(error(found, expected), dtype), attempt(bench, run)
            known = isinstance(took, float) and isinstance(beside[0], float)
            ratio = f"{took / beside[0]:.2f}" if known else "-"
            yield [*row, took, ratio, *beside, wrong, run.workspace.numel() / 1e6]


LAYER_HEADER = ["layer", "batch", "dtype", "library", "x and out", "plugin", "ratio", "conv", "op", "torchvision fp32"]
LAYER_HEADER += ["error", "workspace MB"]
TILES = (
    {}, {"BM": 128, "num_warps": 8}, {"BM": 128}, {"BM": 32}, {"num_warps": 8}, {"TW": 16}, {"TW": 4}, {"BC": 16},
    {"BC": 32}, {"BC": 64}, {"num_stages": 2}, {"num_stages": 4}, {"BC": 16, "num_stages": 4},
)  # fmt: skip
BUSY = (1, 132, 264, 528, 1056)


@torch.no_grad()
def tune_rows(args: argparse.Namespace, harness: Path) -> Iterator[list]:
    """Times of libraries built here with other tiles, and another number of programs below which taps are dealt out."""
    major, minor = torch.cuda.get_device_capability()
    for layer in LAYERS:
        s = layer.settings
        geometry = Geometry(s.stride, s.padding, s.dilation, (3, 3), layer.channels, layer.outputs, 1, 1, False)
        options = PluginOptions((geometry,), (args.tune,), (10 * major + minor,))
        tried = [(f"tiles {tiles}", replace(options, tiles=tiles)) for tiles in TILES]
        tried += [(f"busy {n}", replace(options, compiler=f"c++ -DDCNV2_BUSY={n}")) for n in BUSY]
        for name, choice in tried:
            with tempfile.TemporaryDirectory() as folder:
                library = Path(folder) / "libdcnv2.so"
                built = attempt(build_library, library, choice)
                loaded = built if isinstance(built, str) else attempt(Harness, harness, None, library)
            row = [str(layer), name]
            for batch in args.batch:
                inputs = random_inputs(replace(layer, batch=batch), DTYPES[args.tune], args.spread)
                run = attempt(runner, loaded, s, inputs, True) if isinstance(loaded, Harness) else loaded
                row.append(attempt(bench, run) if isinstance(run, Runner) else run)
            yield row


def shown(rows: Iterator[list]) -> list[list]:
    """The rows; each is told on the error stream as it comes."""
    done = []
    for row in rows:
        print(" | ".join(f"{each:.4f}" if isinstance(each, float) else str(each) for each in row), file=sys.stderr)
        sys.stderr.flush()
        done.append(row)
    return done


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--plugin", nargs="+", default=["libdcnv2.so"], metavar="SO", help="the plugin; several compared"
    )
    parser.add_argument("--tensorrt", required=True, metavar="SO", help="library of TensorRT 11 with its registry")
    parser.add_argument("--harness", default="", metavar="SO", help="harness.cpp, compiled (default: it is now)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8], metavar="N")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp16", "fp32", "bf16"])
    parser.add_argument("--spread", type=float, default=1.5, metavar="PX", help="standard deviation of offsets")
    parser.add_argument("--tune", choices=DTYPES, help="instead: other tiles, for this type")
    args = parser.parse_args(argv)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # fp32 is to mean float32
    print(heading(describe_device(torch.device("cuda"))), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        harness = Path(args.harness or Path(folder) / "harness.so")
        if not args.harness:
            build_harness(harness)
        if args.tune:
            print(table(["layer", "choice", *(f"batch {n}" for n in args.batch)], shown(tune_rows(args, harness))))
            return 0
        # a registry takes one plugin of a name: the other libraries are compared without it
        first, *others = map(Path, args.plugin)
        harnesses = {first.stem: Harness(harness, Path(args.tensorrt), first)}
        harnesses |= {other.stem: Harness(harness, None, other) for other in others}
        header = ["layer", "batch", "dtype", "error, linear", "error, channels-last"]
        print(table(header, shown(check_rows(harnesses[first.stem], args.dtype))), "\n", flush=True)
        print(table(LAYER_HEADER, shown(layer_rows(harnesses, args))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
