"""The plugin's kernels: those of training (models/ops/dcn_kernels.py), reading tensors as TensorRT has them.

x and out are channels-last, offset and mask planar, weight transposed: (G, C/G * K, N/G). Compiled ahead of time
(compile.py), where every number that is no ``tl.constexpr`` may still be given as a constant: for the layers of a
model, all of them are; one kernel that is told them at run time takes every other layer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.ops.dcn_kernels import _blend, _locate, _patch, _weights


@triton.jit
def deform_conv(
    x, offset, mask, weight, bias, out, B, H, W, Ho, Wo, has_bias,
    C, N, CG, NG, CO, CS, OG, K, KW, SH, SW, PH, PW, DH, DW,
    PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr, BN0: tl.constexpr, BN1: tl.constexpr,
):  # fmt: skip
    """out (B, Ho, Wo, N) = bias + sum over taps and channels of sample * mask * weight.

    The grid: patches of BM outputs by blocks of BN0 + BN1 channels, weight groups, shares of the taps. PARTIAL: out
    (shares, B, Ho, Wo, N) float32 gets what each share adds up to, without bias. CG, NG channels of a weight group; CO
    of an offset group; CS of a segment, within which both are constant.
    """
    blocks = tl.cdiv(NG, BN0 + BN1)
    pid = tl.program_id(0)
    g = tl.program_id(1)
    image, row, column, live = _patch(pid // blocks, Ho, Wo, BM, TW)
    pixel = row * Wo + column
    plane = Ho * Wo
    base = x + image.to(tl.int64) * H * W * C + g * CG
    offsets = offset + image.to(tl.int64) * 2 * OG * K * plane + pixel
    masks = mask + image.to(tl.int64) * OG * K * plane + pixel
    wb = weight + g.to(tl.int64) * K * CG * NG
    n0 = (pid % blocks) * (BN0 + BN1) + tl.arange(0, BN0)
    acc0 = tl.zeros((BM, BN0), tl.float32)
    if BN1 > 0:
        n1 = (pid % blocks) * (BN0 + BN1) + BN0 + tl.arange(0, BN1)
        acc1 = tl.zeros((BM, BN1), tl.float32)
    for segment in range(CG // CS):
        group = (g * CG + segment * CS) // CO
        for tap in range(tl.program_id(2), K, tl.num_programs(2)):
            t = group * K + tap
            dy = tl.load(offsets + 2 * t * plane, live, 0.0).to(tl.float32)
            dx = tl.load(offsets + (2 * t + 1) * plane, live, 0.0).to(tl.float32)
            m = tl.load(masks + t * plane, live, 0.0).to(tl.float32)
            y0, x0, ly, lx, top, bottom, left, right, m = _locate(
                dy, dx, m, live, row, column, tap, H, W, SH, SW, PH, PW, DH, DW, KW
            )
            v00, v01, v10, v11 = top & left, top & right, bottom & left, bottom & right
            w00, w01, w10, w11 = _weights(ly, lx, v00, v01, v10, v11, m)
            at = (y0 * W + x0) * C + segment * CS
            for start in range(0, CS, BC):
                c = start + tl.arange(0, BC)
                a = _blend(base, at, W * C, C, c, (c < CS)[None, :], w00, w01, w10, w11, v00, v01, v10, v11)
                a = a.to(x.dtype.element_ty)
                wr = wb + ((segment * CS + c) * K + tap)[:, None] * NG
                b = tl.load(wr + n0[None, :], (c < CS)[:, None] & (n0 < NG)[None, :], 0.0)
                acc0 = tl.dot(a, b, acc0, input_precision=PRECISION)
                if BN1 > 0:
                    b = tl.load(wr + n1[None, :], (c < CS)[:, None] & (n1 < NG)[None, :], 0.0)
                    acc1 = tl.dot(a, b, acc1, input_precision=PRECISION)
    if PARTIAL:
        image += tl.program_id(2) * B
    o = out + (image.to(tl.int64) * plane + pixel)[:, None] * N + g * NG
    _store(o, bias + g * NG, acc0, n0, NG, live, has_bias, PARTIAL)
    if BN1 > 0:
        _store(o, bias + g * NG, acc1, n1, NG, live, has_bias, PARTIAL)


@triton.jit
def _store(out, bias, acc, n, NG, live, has_bias, PARTIAL: tl.constexpr):
    if not PARTIAL:
        acc += tl.load(bias + n, (n < NG) & (has_bias != 0), 0.0).to(tl.float32)[None, :]
    tl.store(out + n[None, :], acc.to(out.dtype.element_ty), live[:, None] & (n < NG)[None, :])


@triton.jit
def add_up(partial, bias, out, shares, size, N, has_bias, BLOCK: tl.constexpr):
    """out (size elements, N channels last) = bias + sum over the first axis of partial (shares, size), in its order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < size
    total = tl.load(bias + i % N, there & (has_bias != 0), 0.0).to(tl.float32)
    p = partial + i
    for _ in range(shares):
        total += tl.load(p, there, 0.0)
        p += size
    tl.store(out + i, total.to(out.dtype.element_ty), there)


@triton.jit
def transpose(source, target, R, S, BLOCK: tl.constexpr):
    """target (B, S, R) = source (B, R, S) with the last two axes swapped; elements of any kind of that size."""
    across = tl.cdiv(S, BLOCK)
    tiles = across * tl.cdiv(R, BLOCK)
    pid = tl.program_id(0)
    base = (pid // tiles).to(tl.int64) * R * S
    r = (pid % tiles) // across * BLOCK + tl.arange(0, BLOCK)
    s = (pid % tiles) % across * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(source + base + r[:, None] * S + s[None, :], (r < R)[:, None] & (s < S)[None, :], 0)
    tl.store(target + base + s[:, None] * R + r[None, :], tl.trans(a), (s < S)[:, None] & (r < R)[None, :])
