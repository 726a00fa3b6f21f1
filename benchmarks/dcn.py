"""What a DCN layer costs on a GPU beside the plain convolution it replaces: time, memory, error.

    python -m benchmarks.dcn                                   # the article's layers at batch 16 and 1
    python -m benchmarks.dcn --batch 1 --graphs                # without the cost of launching
    python -m benchmarks.dcn --batch 16 --dtype bf16 --spread 1.5 --steps   # and whole training steps

Layers: 3x3, stride 2, padding 1, where yolov5x-dcn has them at 640 pixels. Offsets are normal, independent at every
pixel: the worst case for locality.
conv         plain conv2d in channels-last order, tuned by cuDNN
op           deform_conv2d alone, everything in the dtype; it joins offset and mask first, which a block need not;
             by the kernels that --backend names
block        models.common.DCN under autocast: offset convolution, sigmoid, casts of its float32 parameters included
torchvision  its op under fp16 autocast, which computes in float32; contiguous; once per layer and batch
floor        forward: the larger of arithmetic at 790 TFLOP/s and memory traffic at 3.0 TB/s; backward: arithmetic
Times are medians in ms; bwd is fwd+bwd less fwd. Memory: the highest allocation during one forward and backward above
what is held before it, outputs and gradients included. Errors: relative L2 distance to plain PyTorch in float64 on the
same rounded inputs, one image. GPU ms a step: the kernels alone, whatever the CPU took to launch them.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product, repeat

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from benchmarks.made_up import made_up_training
from benchmarks.report import heading, table
from benchmarks.train_throughput import rate
from models.common import DCN
from models.ops.deform_conv import BACKENDS, backend_for, deform_conv2d
from utils.config import TrainConfig
from utils.device import describe_device

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
STRIDE, PADDING, TAPS = 2, 1, 9
FLOPS, BYTES = 790e12, 3.0e12
"""A second, of an H100: half-precision products and DRAM traffic that programs reach."""
STEP_CASES = (
    ("yolov5s.yaml", "auto"),
    ("yolov5s-dcn.yaml", "auto"),
    ("yolov5s-dcn.yaml", "torchvision"),
    ("yolov5x.yaml", "auto"),
    ("yolov5x-dcn.yaml", "auto"),
    ("yolov5x-dcn.yaml", "triton"),
    ("yolov5x-dcn.yaml", "torchvision"),
)


@dataclass(frozen=True)
class Layer:
    """Channels in and out; ``side`` of the square input in pixels."""

    c1: int
    c2: int
    side: int

    def __str__(self) -> str:
        return f"{self.c1}->{self.c2} @{self.side}"


LAYERS = (Layer(80, 160, 320), Layer(160, 320, 160), Layer(320, 640, 80))


@dataclass(frozen=True)
class Inputs:
    """Leaves that ask for gradients, channels last, on the GPU; ``conv_leaves`` are those of a plain convolution."""

    x: Tensor
    offset: Tensor
    mask: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.offset, self.mask, self.weight, self.bias

    @property
    def conv_leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.weight, self.bias

    def to(self, dtype: torch.dtype, memory_format: torch.memory_format = torch.channels_last) -> Inputs:
        """New leaves with the same values, as far as ``dtype`` holds them."""

        orders = (memory_format if tensor.dim() == 4 else torch.contiguous_format for tensor in self.leaves)
        return Inputs(*(leaf_of(t.to(dtype, memory_format=o, copy=True)) for t, o in zip(self.leaves, orders)))


def leaf_of(tensor: Tensor) -> Tensor:
    """The same values, outside any graph, asking for gradients."""
    return tensor.detach().requires_grad_()


def make_inputs(layer: Layer, batch: int, dtype: torch.dtype, spread: float, device: str = "cuda") -> Inputs:
    """Random, the same every time. ``spread``: standard deviation of the offsets in pixels."""
    random = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=random, device=device)
    out = (batch, TAPS, layer.side // STRIDE, layer.side // STRIDE)
    return Inputs(
        normal(batch, layer.c1, layer.side, layer.side),
        normal(batch, 2 * TAPS, *out[2:]) * spread,
        torch.rand(out, generator=random, device=device),
        normal(layer.c2, layer.c1, 3, 3) / math.sqrt(TAPS * layer.c1),
        normal(layer.c2),
    ).to(dtype)


@torch.no_grad()
def make_block(layer: Layer, spread: float, backend: str = "auto", device: str = "cuda") -> DCN:
    """The layer as a model holds it, with an offset branch that gives offsets of this spread for normal input."""
    torch.manual_seed(0)
    block = DCN(layer.c1, layer.c2, 3, STRIDE).to(device, memory_format=torch.channels_last)
    scale = torch.full((3 * TAPS, 1, 1, 1), spread, device=device)
    scale[2 * TAPS :] = 1
    block.conv_offset_mask.weight.normal_().mul_(scale / math.sqrt(TAPS * layer.c1))
    block.backend = backend
    return block


def plain(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Equation 1 of arXiv 1811.11168 in plain PyTorch, for 3x3, stride 2, padding 1 and one group; differentiable."""
    batch, channels, height, width = x.shape
    rows, columns = offset.shape[2:]
    base_y = torch.arange(rows, device=x.device).view(-1, 1) * STRIDE - PADDING
    base_x = torch.arange(columns, device=x.device) * STRIDE - PADDING
    pixels, out = x.flatten(2), bias.view(1, -1, 1, 1)
    for tap in range(TAPS):
        i, j = divmod(tap, 3)
        y, z = base_y + i + offset[:, 2 * tap], base_x + j + offset[:, 2 * tap + 1]
        top, left = y.detach().floor(), z.detach().floor()
        sample = torch.zeros((), dtype=x.dtype, device=x.device)
        for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
            for column, weight_x in ((left, 1 - (z - left)), (left + 1, z - left)):
                inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                at = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long().view(batch, 1, -1)
                values = pixels.gather(2, at.expand(-1, channels, -1)).view(batch, channels, rows, columns)
                sample = sample + values * (weight_y * weight_x * inside).unsqueeze(1)
        out = out + torch.einsum("bchw,oc->bohw", sample * mask[:, tap : tap + 1], weight[:, :, i, j])
    return out


def op(inputs: Inputs, backend: str = "auto") -> Tensor:
    return deform_conv2d(*inputs.leaves, stride=STRIDE, padding=PADDING, backend=backend)


def conv(inputs: Inputs) -> Tensor:
    return F.conv2d(inputs.x, inputs.weight, inputs.bias, STRIDE, PADDING)


def of_block(block: DCN, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
        return block(x)


def of_torchvision(inputs: Inputs) -> Tensor:
    x, offset, mask, weight, bias = inputs.leaves
    with torch.autocast("cuda", torch.float16):  # what it does: all to float32, the result back to fp16
        return torchvision.ops.deform_conv2d(x, offset, weight, bias, STRIDE, PADDING, mask=mask)


def floors(layer: Layer, batch: int) -> tuple[float, float]:
    """(forward, backward) in ms, half precision: what arithmetic and memory traffic alone would take."""
    pixels = batch * (layer.side // STRIDE) ** 2
    product_ms = 2 * pixels * TAPS * layer.c1 * layer.c2 / FLOPS * 1e3
    numbers = batch * layer.side**2 * layer.c1 + pixels * (layer.c2 + 3 * TAPS)
    return max(product_ms, 2 * numbers / BYTES * 1e3), 2 * product_ms


Bench = Callable[[Callable[[], object]], float]


def bencher(graphs: bool) -> Bench:
    """Median time in ms of a function: called again and again, or as replays of one CUDA graph."""
    import triton

    if graphs:
        return lambda function: triton.testing.do_bench_cudagraph(function, rep=20, return_mode="median")
    return lambda function: triton.testing.do_bench(function, warmup=25, rep=100, return_mode="median")


def gradients(forward: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(forward(), leaves, grad)


def times(forward: Callable[[], Tensor], leaves: Sequence[Tensor], bench: Bench) -> tuple[float, float]:
    """(forward, forward and backward) in ms."""
    with torch.no_grad():
        ahead = bench(forward)
        grad = torch.randn_like(forward())
    return ahead, bench(lambda: gradients(forward, leaves, grad))


def extra_memory(forward: Callable[[], Tensor], leaves: Sequence[Tensor]) -> float:
    """Peak of one forward and backward above what is held before, in MB."""
    with torch.no_grad():
        grad = torch.randn_like(forward())
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients(forward, leaves, grad)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 1e6


def errors(
    forward: Callable[[Inputs], Tensor], exact: Callable[[Inputs], Tensor], inputs: Inputs, leaves: str
) -> list[float]:
    """Relative L2 error of the output and of the gradients of ``leaves`` (an attribute of Inputs) to float64."""
    double = inputs.to(torch.float64)
    got, true = forward(inputs), exact(double)
    grad = torch.randn_like(got)
    got = [got, *torch.autograd.grad(got, getattr(inputs, leaves), grad)]
    true = [true, *torch.autograd.grad(true, getattr(double, leaves), grad.double())]
    return [float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in zip(got, true)]


def torchvision_times(layer: Layer, batch: int, spread: float) -> tuple[float, float]:
    """Its times as a user of fp16 AMP pays them: x, offset and mask in fp16, parameters in float32."""
    half = make_inputs(layer, batch, torch.float32, spread).to(torch.float16, torch.contiguous_format)
    inputs = replace(half, weight=leaf_of(half.weight.float()), bias=leaf_of(half.bias.float()))
    return times(lambda: of_torchvision(inputs), inputs.leaves, bencher(graphs=False))


def time_row(
    layer: Layer, batch: int, dtype: str, spread: float, backend: str, reference: Sequence[float], bench: Bench
) -> list:
    """Times of the convolution, the op and the block, ratios, torchvision's times (``reference``) and floors."""
    inputs, block = make_inputs(layer, batch, DTYPES[dtype], spread), make_block(layer, spread, backend)
    plain_times = times(lambda: conv(inputs), inputs.conv_leaves, bench)
    row = [batch, str(layer), dtype, spread, *plain_times]
    for forward, leaves in (
        (lambda: op(inputs, backend), inputs.leaves),
        (lambda: of_block(block, inputs.x), (inputs.x, *block.parameters())),
    ):
        ahead, both = times(forward, leaves, bench)
        row += [ahead, both - ahead, both, *(f"{a / b:.2f}" for a, b in zip((ahead, both), plain_times))]
    forward_floor, backward_floor = floors(layer, batch)
    lowest = ["-", "-"] if dtype == "fp32" else [forward_floor, forward_floor + backward_floor]
    return [*row, *reference, *lowest]


TIME_HEADER = """batch|layer|dtype|offsets, px|conv fwd|conv fwd+bwd|op fwd|op bwd|op fwd+bwd|ratio fwd|ratio fwd+bwd
|block fwd|block bwd|block fwd+bwd|block ratio fwd|block ratio fwd+bwd|torchvision fwd|torchvision fwd+bwd|floor fwd
|floor fwd+bwd""".replace("\n", "").split("|")


def memory_row(layer: Layer, batch: int, dtype: str, spread: float, backend: str) -> list:
    """Extra memory of the convolution, the op and the block, in MB, with ratios."""
    inputs, block = make_inputs(layer, batch, DTYPES[dtype], spread), make_block(layer, spread, backend)
    base = extra_memory(lambda: conv(inputs), inputs.conv_leaves)
    alone = extra_memory(lambda: op(inputs, backend), inputs.leaves)
    whole = extra_memory(lambda: of_block(block, inputs.x), (inputs.x, *block.parameters()))
    return [batch, str(layer), dtype, base, alone, f"{alone / base:.2f}", whole, f"{whole / base:.2f}"]


MEMORY_HEADER = ["batch", "layer", "dtype", "conv MB", "op MB", "ratio", "block MB", "block ratio"]


def error_row(layer: Layer, dtype: str, spread: float, backend: str) -> list:
    """Errors of the op, and of the convolution where it has the same tensor, as ``op / conv``."""
    inputs = make_inputs(layer, 1, DTYPES[dtype], spread)
    out, x, offset, mask, weight, bias = errors(
        partial(op, backend=backend), lambda i: plain(*i.leaves), inputs, "leaves"
    )
    pairs = zip((out, x, weight, bias), errors(conv, conv, inputs, "conv_leaves"))
    return [str(layer), dtype, spread, *(f"{a:.1e} / {b:.1e}" for a, b in pairs), f"{offset:.1e}", f"{mask:.1e}"]


ERROR_HEADER = ["layer", "dtype", "offsets, px", "out: op / conv", "x grad", "weight grad", "bias grad"]
ERROR_HEADER += ["offset grad", "mask grad"]


def step_row(name: str, backend: str, args: argparse.Namespace, device: torch.device) -> list:
    """Images/s, ms and peak GB of the training loop's step on one made-up batch in memory, bf16."""
    cfg = TrainConfig(
        cfg=name, data=args.data, batch_size=args.step_batch, imgsz=args.imgsz, amp="bf16", dcn_backend=backend
    )
    learner, batch = made_up_training(cfg, device)
    torch.cuda.reset_peak_memory_stats()
    speed = rate(learner, repeat(batch, 60), warmup=20)
    peak = torch.cuda.max_memory_allocated() / 1e9
    stem = name.removesuffix(".yaml")
    busy = kernel_time(lambda: rate(learner, repeat(batch, 10), warmup=0)) / 10
    return [stem, backend if "dcn" in stem else "-", speed, cfg.batch_size / speed * 1e3, busy, peak]


def kernel_time(function: Callable[[], object]) -> float:
    """ms that kernels and copies took on the GPU, whatever the CPU took to launch them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e3


def with_ratio(rows: list[list]) -> list[list]:
    """Each row with its two times over those of the plain model above it."""
    done, base = [], []
    for row in rows:
        base = row[3:5] if row[1] == "-" else base
        done.append([*row, *(f"{mine / plain:.2f}" for mine, plain in zip(row[3:5], base))])
    return done


STEP_HEADER = ["model", "backend", "images/s", "ms a step", "GPU ms a step", "peak GB", "time / plain"]
STEP_HEADER += ["GPU time / plain"]


def layer_tables(args: argparse.Namespace, bench: Bench) -> list[str]:
    """The three tables on layers: times, memory, errors."""
    timed, memory = [], []
    for batch, layer in product(args.batch, LAYERS):
        reference = torchvision_times(layer, batch, args.spread[0])
        for dtype in args.dtype:
            for spread in args.spread:
                timed.append(time_row(layer, batch, dtype, spread, args.backend, reference, bench))
                print(*timed[-1], file=sys.stderr)
            memory.append(memory_row(layer, batch, dtype, args.spread[0], args.backend))
    wrong = [error_row(*case, args.backend) for case in product(LAYERS, args.dtype, args.spread)]
    return [table(TIME_HEADER, timed), table(MEMORY_HEADER, memory), table(ERROR_HEADER, wrong)]


def step_table(args: argparse.Namespace, device: torch.device) -> str:
    """The table on whole training steps; cuDNN as the trainer sets it."""
    kernel_time(lambda: None)  # the profiler has to be there before a graph is recorded that it is to look into
    rows = []
    for name, backend in STEP_CASES:
        rows.append(step_row(name, backend, args, device))
        print(*rows[-1], file=sys.stderr)
        gc.collect()
        torch.cuda.empty_cache()
    return table(STEP_HEADER, with_ratio(rows))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", nargs="+", type=int, default=[16, 1])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["fp16", "bf16"])
    parser.add_argument("--spread", nargs="+", type=float, default=[1.5, 8.0], metavar="PX")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of the op and the block (default: auto)")
    parser.add_argument("--graphs", action="store_true", help="time replays of CUDA graphs: no launch cost")
    parser.add_argument("--steps", action="store_true", help="whole training steps as well")
    parser.add_argument("--step-batch", type=int, default=16)
    parser.add_argument("--imgsz", type=int, default=640, help="of the training steps")
    parser.add_argument("--data", default="bccd.yaml", help="whose class count the training steps use")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.dcn: measures GPU kernels, and there is no CUDA device here")
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        print(f"kernels: {backend_for(device, torch.float16, args.backend)}", file=sys.stderr)
    except ValueError as error:
        raise SystemExit(f"benchmarks.dcn: {error}") from None
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):  # fp32 is to mean float32
        tables = layer_tables(args, bencher(args.graphs))
    if args.steps:
        tables.append(step_table(args, device))
    print(heading(describe_device(device)))
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
