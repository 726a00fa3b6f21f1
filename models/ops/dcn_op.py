"""The fused deformable convolution as operators ``dcn::forward`` and ``dcn::backward`` of torch.library.

As registered operators they pass through torch.compile, torch.export and CUDA graphs in one piece, and DistributedData-
Parallel sees ordinary gradients. The kernels are Triton's (:mod:`models.ops.dcn_launch`), imported on first use, and
for the backward of usual layers, when ``native``, those in CUDA C++ (:mod:`models.ops.dcn_cuda`), which are faster.

``raw`` (B, 3*K*OG, H', W') is the output of a layer's offset convolution as it stands: 2*K*OG offsets in input pixels,
a (y, x) pair per tap, groups outermost, then K*OG masks, or their logits when ``logits``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from models.ops import dcn_cuda, nvrtc
from models.ops.geometry import Geometry
from models.ops.layout import channel_sums, empty_map


def _forward(
    x: Tensor,
    raw: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    offset_groups: int,
    logits: bool,
    native: bool,
    silu: bool,
) -> Tensor:
    """(B, N, H', W') in the dtype of x, channels last; x, weight float32, float16 or bfloat16, both the same.

    ``native``: for the backward to come. ``silu``: the result goes through SiLU; for inference, there is no backward.
    """
    from models.ops import dcn_launch

    geometry = Geometry.of(x, weight, stride, padding, dilation, offset_groups, logits)
    return dcn_launch.forward(x, raw, weight, bias, geometry, silu)


def _fake_forward(x, raw, weight, bias, stride, padding, dilation, offset_groups, logits, native, silu):
    return empty_map(x, (x.shape[0], weight.shape[0], *raw.shape[2:]))


def _backward(
    grad: Tensor,
    x: Tensor,
    raw: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    offset_groups: int,
    logits: bool,
    native: bool,
    need_x: bool,
    need_raw: bool,
    need_weight: bool,
    need_bias: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, raw, weight, each in its tensor's dtype, and bias (float32); those not needed are empty."""
    from models.ops import dcn_launch

    geometry = Geometry.of(x, weight, stride, padding, dilation, offset_groups, logits)
    inputs = (grad, x, raw, weight, geometry)
    native = native and not deterministic and dcn_cuda.suits(x, weight, offset_groups)
    grad_x, grad_raw, grad_weight = x.new_empty(0), raw.new_empty(0), weight.new_empty(0)
    if need_x or need_raw:
        own = partial(dcn_cuda.backward, *inputs, need_x) if native else None
        grad_x, grad_raw = _first(own, partial(dcn_launch.backward, *inputs, need_x, deterministic))
    if need_weight:
        own = partial(dcn_cuda.backward_weight, *inputs) if native and geometry.channels >= dcn_cuda.MANY else None
        grad_weight = _first(own, partial(dcn_launch.backward_weight, *inputs))
    grad_bias = channel_sums(grad) if need_bias else grad.new_empty(0, dtype=torch.float32)
    return grad_x, grad_raw, grad_weight, grad_bias


def _first(native: Callable | None, triton: Callable):
    """What ``native`` returns; ``triton``'s instead where there is none, or where it cannot be compiled or started."""
    if native is not None:
        try:
            return native()
        except nvrtc.CudaKernelError as error:
            warnings.warn(f"DCN backend cuda gives way to triton: {error}", stacklevel=2)
    return triton()


def _fake_backward(
    grad, x, raw, weight, stride, padding, dilation, offset_groups, logits, native,
    need_x, need_raw, need_weight, need_bias, deterministic,
):  # fmt: skip
    return (
        empty_map(x, x.shape) if need_x else x.new_empty(0),
        empty_map(raw, raw.shape) if need_x or need_raw else raw.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
        grad.new_empty(weight.shape[0] if need_bias else 0, dtype=torch.float32),
    )


def _save(ctx, inputs, output) -> None:
    x, raw, weight, bias, *ctx.geometry, silu = inputs
    if silu:
        raise RuntimeError("dcn::forward with silu has no backward; apply SiLU to its result")
    ctx.save_for_backward(x, raw, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx, grad):
    x, raw, weight = ctx.saved_tensors
    need_x, need_raw, need_weight, need_bias = ctx.needs_input_grad[:4]
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_x, grad_raw, grad_weight, grad_bias = backward(
        grad, x, raw, weight, *ctx.geometry, need_x, need_raw, need_weight, need_bias, deterministic
    )
    return (
        grad_x if need_x else None,
        grad_raw if need_raw else None,
        grad_weight if need_weight else None,
        grad_bias.to(ctx.bias_dtype) if need_bias else None,
        *(None,) * 7,
    )


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("the deformable convolution has no second derivative: dcn::backward has no gradient of its own")


def _operator(name: str, kernel: Callable, fake: Callable) -> torch._ops.OpOverload:
    """``dcn::name`` for all devices, as ``torch.library.custom_op`` would make it, but for what that does in its calls:
    it imports torch's compiler at the first, three seconds of a start, and compares all inputs with all outputs."""
    untraced: list[Callable] = []

    def run(*args):
        compiler = sys.modules.get("torch._dynamo")
        if compiler is None:
            return kernel(*args)
        if not untraced:  # around a break in its graph it would look into the kernel as well
            untraced.append(compiler.disable(kernel))
        return untraced[0](*args)

    schema = torch.library.infer_schema(kernel, mutates_args=())
    torch.library.define(f"dcn::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"dcn::{name}", "default", run)
    torch.library.register_fake(f"dcn::{name}", fake)
    return getattr(torch.ops.dcn, name).default


forward = _operator("forward", _forward, _fake_forward)
backward = _operator("backward", _backward, _fake_backward)
torch.library.register_autograd("dcn::forward", _gradients, setup_context=_save)
torch.library.register_autograd("dcn::backward", _no_second_derivative)
