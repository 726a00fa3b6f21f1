"""Triton kernels of the modulated deformable convolution: implicit GEMM with a bilinear gather, no column buffer.

All maps are channels-last here: x (B, H, W, C), raw (B, Ho, Wo, P), out and its gradient (B, Ho, Wo, N). The P channels
of ``raw`` are 2*K*OG offsets (a (y, x) pair per tap, groups outermost) and K*OG masks, or their logits when LOGITS. A
program owns a patch of BM outputs, TW wide, of one image, so that the
samples of neighbours meet in the cache.

The C channels are cut into segments of CS, the greatest common divisor of a weight group's and an offset group's
size: within a segment both are constant. Bilinear weights and sums are float32 whatever x is. Fractions are those of
the offsets, and whole pixels are counted apart, so that nothing is rounded where an offset meets its coordinate: at 320
pixels float32 would lose 5 digits of the fraction there.

A sample counts where -1 <= y < H and -1 <= x < W; a corner outside the image is 0 and is not read. Exactly at -1 the
value is 0 and the derivative one-sided, as torchvision's. A NaN coordinate fails every comparison, so that nothing is
read, and turns the mask into NaN, which reaches the output.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ["H", "W", "Ho", "Wo"]
"""Not to be compiled for: image sizes change from batch to batch (--multi-scale, --rect)."""


@triton.jit
def _patch(pid, Ho, Wo, BM: tl.constexpr, TW: tl.constexpr):
    """Image, row, column and existence of the BM outputs of patch ``pid``."""
    TH: tl.constexpr = BM // TW
    across = tl.cdiv(Wo, TW)
    patches = across * tl.cdiv(Ho, TH)
    image = pid // patches
    patch = pid % patches
    i = tl.arange(0, BM)
    row = (patch // across) * TH + i // TW
    column = (patch % across) * TW + i % TW
    return image, row, column, (row < Ho) & (column < Wo)


@triton.jit
def _place(
    raw, at, live, row, column, tap, group, H, W,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    KW: tl.constexpr, K: tl.constexpr, OG: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """:func:`_locate` for offsets and masks that lie together, at element ``at`` of raw."""
    t = group * K + tap
    dy = tl.load(raw + at + 2 * t, live, 0.0).to(tl.float32)
    dx = tl.load(raw + at + 2 * t + 1, live, 0.0).to(tl.float32)
    mask = tl.load(raw + at + 2 * K * OG + t, live, 0.0).to(tl.float32)
    if LOGITS:
        mask = tl.sigmoid(mask)
    return _locate(dy, dx, mask, live, row, column, tap, H, W, SH, SW, PH, PW, DH, DW, KW)


@triton.jit
def _locate(dy, dx, mask, live, row, column, tap, H, W, SH, SW, PH, PW, DH, DW, KW):
    """Where tap ``tap`` samples: the upper left corner (y0, x0), the fractions (ly, lx), whether each of the rows and
    columns around it exists, and the mask."""
    row = row * SH - PH + (tap // KW) * DH
    column = column * SW - PW + (tap % KW) * DW
    mask = tl.where((dy == dy) & (dx == dx), mask, float("nan"))
    inside = live & (dy >= -1 - row) & (dy < H - row) & (dx >= -1 - column) & (dx < W - column)
    dy = tl.where(inside, dy, 0.0)
    dx = tl.where(inside, dx, 0.0)
    fy = tl.floor(dy)
    fx = tl.floor(dx)
    y0 = tl.where(inside, row, 0) + fy.to(tl.int32)
    x0 = tl.where(inside, column, 0) + fx.to(tl.int32)
    top = inside & (y0 >= 0)
    bottom = inside & (y0 + 1 < H)
    return y0, x0, dy - fy, dx - fx, top, bottom, x0 >= 0, x0 + 1 < W, mask


@triton.jit
def _weights(ly, lx, v00, v01, v10, v11, mask):
    """Bilinear weights times mask; 0 * NaN stays NaN, so that a NaN offset is seen in the output."""
    w00 = tl.where(v00, (1 - ly) * (1 - lx), 0.0) * mask
    w01 = tl.where(v01, (1 - ly) * lx, 0.0) * mask
    w10 = tl.where(v10, ly * (1 - lx), 0.0) * mask
    w11 = tl.where(v11, ly * lx, 0.0) * mask
    return w00, w01, w10, w11


@triton.jit
def _blend(x, at, row, pixel, c, within, w00, w01, w10, w11, v00, v01, v10, v11):
    """Weighted sum (BM, BC) in float32 of the four corners. ``at``: element of the upper left corner's channel 0."""
    p = x + at[:, None] + c[None, :]
    a = tl.load(p, v00[:, None] & within, 0.0).to(tl.float32) * w00[:, None]
    a += tl.load(p + pixel, v01[:, None] & within, 0.0).to(tl.float32) * w01[:, None]
    a += tl.load(p + row, v10[:, None] & within, 0.0).to(tl.float32) * w10[:, None]
    a += tl.load(p + row + pixel, v11[:, None] & within, 0.0).to(tl.float32) * w11[:, None]
    return a


@triton.jit(do_not_specialize=SIZES)
def forward(
    x, raw, weight, bias, out, H, W, Ho, Wo,
    C: tl.constexpr, N: tl.constexpr, G: tl.constexpr, OG: tl.constexpr, P: tl.constexpr, CS: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    KW: tl.constexpr, K: tl.constexpr, LOGITS: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    SHARES: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr, BN0: tl.constexpr, BN1: tl.constexpr,
):  # fmt: skip
    """out = bias + sum over taps and channels of sample * mask * weight, through SiLU if SILU. weight (G, K, C/G, N/G).

    With more than one of SHARES the taps are dealt out to so many programs, and out is (B, SHARES, Ho, Wo, N).
    Two accumulators, BN0 and BN1 outputs wide, share one gathered tile: N is rarely a power of two.
    """
    CG: tl.constexpr = C // G
    NG: tl.constexpr = N // G
    CO: tl.constexpr = C // OG
    blocks = tl.cdiv(NG, BN0 + BN1)
    pid = tl.program_id(0)
    g = tl.program_id(1)
    image, row, column, live = _patch(pid // blocks, Ho, Wo, BM, TW)
    pixel = row * Wo + column
    base = x + image.to(tl.int64) * H * W * C + g * CG
    rawb = raw + image.to(tl.int64) * Ho * Wo * P
    wb = weight + g.to(tl.int64) * K * CG * NG
    n0 = (pid % blocks) * (BN0 + BN1) + tl.arange(0, BN0)
    acc0 = tl.zeros((BM, BN0), tl.float32)
    if BN1 > 0:
        n1 = (pid % blocks) * (BN0 + BN1) + BN0 + tl.arange(0, BN1)
        acc1 = tl.zeros((BM, BN1), tl.float32)
    for segment in range(CG // CS):
        group = (g * CG + segment * CS) // CO
        for tap in range(tl.program_id(2) if SHARES > 1 else 0, K, SHARES):
            y0, x0, ly, lx, top, bottom, left, right, mask = _place(
                rawb, pixel * P, live, row, column, tap, group, H, W, SH, SW, PH, PW, DH, DW, KW, K, OG, LOGITS
            )
            v00, v01, v10, v11 = top & left, top & right, bottom & left, bottom & right
            w00, w01, w10, w11 = _weights(ly, lx, v00, v01, v10, v11, mask)
            at = (y0 * W + x0) * C + segment * CS
            for start in range(0, CS, BC):
                c = start + tl.arange(0, BC)
                a = _blend(base, at, W * C, C, c, (c < CS)[None, :], w00, w01, w10, w11, v00, v01, v10, v11)
                a = a.to(x.dtype.element_ty)
                wr = wb + (tap * CG + segment * CS + c)[:, None] * NG
                b = tl.load(wr + n0[None, :], (c < CS)[:, None] & (n0 < NG)[None, :], 0.0)
                acc0 = tl.dot(a, b, acc0, input_precision=PRECISION)
                if BN1 > 0:
                    b = tl.load(wr + n1[None, :], (c < CS)[:, None] & (n1 < NG)[None, :], 0.0)
                    acc1 = tl.dot(a, b, acc1, input_precision=PRECISION)
    if SHARES > 1:
        image = image * SHARES + tl.program_id(2)
    o = out + (image.to(tl.int64) * Ho * Wo + pixel)[:, None] * N + g * NG
    if HAS_BIAS:
        acc0 += tl.load(bias + g * NG + n0, n0 < NG, 0.0).to(tl.float32)[None, :]
    if SILU:
        acc0 *= tl.sigmoid(acc0)
    tl.store(o + n0[None, :], acc0.to(out.dtype.element_ty), live[:, None] & (n0 < NG)[None, :])
    if BN1 > 0:
        if HAS_BIAS:
            acc1 += tl.load(bias + g * NG + n1, n1 < NG, 0.0).to(tl.float32)[None, :]
        if SILU:
            acc1 *= tl.sigmoid(acc1)
        tl.store(o + n1[None, :], acc1.to(out.dtype.element_ty), live[:, None] & (n1 < NG)[None, :])


@triton.jit
def _scatter(pointer, value, scale, where, EXACT: tl.constexpr):
    """Add to the gradient of x: in float32, or in 64-bit fixed point, whose sum does not depend on the order."""
    if EXACT:
        tl.atomic_add(pointer, (value.to(tl.float64) * scale).to(tl.int64), where, sem="relaxed")
    else:
        tl.atomic_add(pointer, value, where, sem="relaxed")


@triton.jit(do_not_specialize=["first", *SIZES])
def backward_input(
    x, raw, weight, grad, grad_x, grad_raw, fixed, first, H, W, Ho, Wo,
    C: tl.constexpr, N: tl.constexpr, G: tl.constexpr, OG: tl.constexpr, P: tl.constexpr, CS: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    KW: tl.constexpr, K: tl.constexpr, LOGITS: tl.constexpr, EXACT: tl.constexpr, NEED_X: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr, BN0: tl.constexpr, BN1: tl.constexpr,
    RESIDENT: tl.constexpr,
):  # fmt: skip
    """Gradients of raw, complete, and of x, added to grad_x, whose first image is image ``first`` of the others.
    weight (G, K, N/G, C/G).

    D = grad . weight is the gradient of the column a tap would have. The four sums of D times a corner give all three
    gradients of the tap; they need no atomics, since a program sees all channels of its outputs. RESIDENT (one weight
    group, all its outputs within BN0 + BN1) reads the patch of grad once; otherwise it is read again, BN0 outputs at a
    time, for every tap and block of channels. The second dimension of the grid deals out the taps.
    """
    CG: tl.constexpr = C // G
    NG: tl.constexpr = N // G
    CO: tl.constexpr = C // OG
    image, row, column, live = _patch(tl.program_id(0), Ho, Wo, BM, TW)
    pixel = row * Wo + column
    whole = (image + first).to(tl.int64)
    base = x + whole * H * W * C
    rawb = raw + whole * Ho * Wo * P
    ga = grad + whole * Ho * Wo * N + pixel[:, None] * N
    target = grad_x + image.to(tl.int64) * H * W * C
    scale = tl.load(fixed) if EXACT else 1.0
    n0 = tl.arange(0, BN0)
    if RESIDENT:
        a0 = tl.load(ga + n0[None, :], live[:, None] & (n0 < NG)[None, :], 0.0)
        if BN1 > 0:
            n1 = BN0 + tl.arange(0, BN1)
            a1 = tl.load(ga + n1[None, :], live[:, None] & (n1 < NG)[None, :], 0.0)
    for group in range(OG):
        for tap in range(tl.program_id(1), K, tl.num_programs(1)):
            y0, x0, ly, lx, top, bottom, left, right, mask = _place(
                rawb, pixel * P, live, row, column, tap, group, H, W, SH, SW, PH, PW, DH, DW, KW, K, OG, LOGITS
            )
            v00, v01, v10, v11 = top & left, top & right, bottom & left, bottom & right
            at = (y0 * W + x0) * C
            s00 = tl.zeros((BM,), tl.float32)
            s01 = tl.zeros((BM,), tl.float32)
            s10 = tl.zeros((BM,), tl.float32)
            s11 = tl.zeros((BM,), tl.float32)
            for segment in range(CO // CS):
                g = (group * CO + segment * CS) // CG
                for start in range(0, CS, BC):
                    c = start + tl.arange(0, BC)
                    within = (c < CS)[None, :]
                    c += group * CO + segment * CS
                    wb = weight + (g * K + tap) * NG * CG - g * CG
                    if RESIDENT:
                        b = tl.load(wb + n0[:, None] * CG + c[None, :], (n0 < NG)[:, None] & within, 0.0)
                        d = tl.dot(a0, b, input_precision=PRECISION)
                        if BN1 > 0:
                            b = tl.load(wb + n1[:, None] * CG + c[None, :], (n1 < NG)[:, None] & within, 0.0)
                            d = tl.dot(a1, b, d, input_precision=PRECISION)
                    else:
                        d = tl.zeros((BM, BC), tl.float32)
                        for first_n in range(0, NG, BN0):
                            n = first_n + tl.arange(0, BN0)
                            a = tl.load(ga + (g * NG + n)[None, :], live[:, None] & (n < NG)[None, :], 0.0)
                            b = tl.load(wb + n[:, None] * CG + c[None, :], (n < NG)[:, None] & within, 0.0)
                            d = tl.dot(a, b, d, input_precision=PRECISION)
                    e = at[:, None] + c[None, :]
                    m00, m01 = v00[:, None] & within, v01[:, None] & within
                    m10, m11 = v10[:, None] & within, v11[:, None] & within
                    s00 += tl.sum(d * tl.load(base + e, m00, 0.0).to(tl.float32), 1)
                    s01 += tl.sum(d * tl.load(base + e + C, m01, 0.0).to(tl.float32), 1)
                    s10 += tl.sum(d * tl.load(base + e + W * C, m10, 0.0).to(tl.float32), 1)
                    s11 += tl.sum(d * tl.load(base + e + W * C + C, m11, 0.0).to(tl.float32), 1)
                    if NEED_X:
                        d = d * mask[:, None]
                        _scatter(target + e, d * ((1 - ly) * (1 - lx))[:, None], scale, m00, EXACT)
                        _scatter(target + e + C, d * ((1 - ly) * lx)[:, None], scale, m01, EXACT)
                        _scatter(target + e + W * C, d * (ly * (1 - lx))[:, None], scale, m10, EXACT)
                        _scatter(target + e + W * C + C, d * (ly * lx)[:, None], scale, m11, EXACT)
            grad_mask = (1 - ly) * ((1 - lx) * s00 + lx * s01) + ly * ((1 - lx) * s10 + lx * s11)
            grad_y = mask * ((1 - lx) * (s10 - s00) + lx * (s11 - s01))
            grad_u = mask * ((1 - ly) * (s01 - s00) + ly * (s11 - s10))
            if LOGITS:
                grad_mask = grad_mask * mask * (1 - mask)
            t = group * K + tap
            o = grad_raw + whole * Ho * Wo * P + pixel * P
            element = grad_raw.dtype.element_ty
            tl.store(o + 2 * t, grad_y.to(element), live)
            tl.store(o + 2 * t + 1, grad_u.to(element), live)
            tl.store(o + 2 * K * OG + t, grad_mask.to(element), live)


@triton.jit
def _column(
    x, raw, row, column, pixel, live, tap, group, c, within, H, W,
    C: tl.constexpr, OG: tl.constexpr, P: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    KW: tl.constexpr, K: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """mask * sample (BM, BC) of one tap, in the dtype of x."""
    y0, x0, ly, lx, top, bottom, left, right, mask = _place(
        raw, pixel * P, live, row, column, tap, group, H, W, SH, SW, PH, PW, DH, DW, KW, K, OG, LOGITS
    )
    v00, v01, v10, v11 = top & left, top & right, bottom & left, bottom & right
    w00, w01, w10, w11 = _weights(ly, lx, v00, v01, v10, v11, mask)
    at = (y0 * W + x0) * C
    return _blend(x, at, W * C, C, c, within, w00, w01, w10, w11, v00, v01, v10, v11).to(x.dtype.element_ty)


@triton.jit(do_not_specialize=["patches", *SIZES])
def backward_weight(
    x, raw, grad, partial, patches, H, W, Ho, Wo,
    C: tl.constexpr, N: tl.constexpr, G: tl.constexpr, OG: tl.constexpr, P: tl.constexpr, CS: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    KW: tl.constexpr, K: tl.constexpr, LOGITS: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    TAPS: tl.constexpr, BM: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """partial (SPLITS, G, K, N/G, C/G) float32: the sum over every SPLITS-th patch of grad^T . columns.

    TAPS (1 or 3, a divisor of K) taps share each tile of grad. Partial sums are added up afterwards in a fixed order:
    no atomics, the same bits every time.
    """
    CG: tl.constexpr = C // G
    NG: tl.constexpr = N // G
    CO: tl.constexpr = C // OG
    SEGMENT_BLOCKS: tl.constexpr = (CS + BC - 1) // BC
    C_BLOCKS: tl.constexpr = SEGMENT_BLOCKS * (CG // CS)
    N_BLOCKS: tl.constexpr = (NG + BN - 1) // BN
    pid = tl.program_id(0)
    split = tl.program_id(1)
    n = (pid % N_BLOCKS) * BN + tl.arange(0, BN)
    tap = pid // N_BLOCKS % (K // TAPS) * TAPS
    block = pid // (N_BLOCKS * (K // TAPS)) % C_BLOCKS
    g = pid // (N_BLOCKS * (K // TAPS) * C_BLOCKS)
    segment = block // SEGMENT_BLOCKS
    c = (block % SEGMENT_BLOCKS) * BC + tl.arange(0, BC)
    within = (c < CS)[None, :]
    c += g * CG + segment * CS
    group = (g * CG + segment * CS) // CO
    acc0 = tl.zeros((BN, BC), tl.float32)
    if TAPS == 3:
        acc1 = tl.zeros((BN, BC), tl.float32)
        acc2 = tl.zeros((BN, BC), tl.float32)
    for patch in range(split, patches, SPLITS):
        image, row, column, live = _patch(patch, Ho, Wo, BM, TW)
        pixel = row * Wo + column
        whole = image.to(tl.int64)
        xb = x + whole * H * W * C
        rb = raw + whole * Ho * Wo * P
        d = tl.load(
            grad + whole * Ho * Wo * N + pixel[:, None] * N + (g * NG + n)[None, :],
            live[:, None] & (n < NG)[None, :],
            0.0,
        )
        d = tl.trans(d)
        a = _column(
            xb, rb, row, column, pixel, live, tap, group, c, within, H, W,
            C, OG, P, SH, SW, PH, PW, DH, DW, KW, K, LOGITS,
        )  # fmt: skip
        acc0 = tl.dot(d, a, acc0, input_precision=PRECISION)
        if TAPS == 3:
            a = _column(
                xb, rb, row, column, pixel, live, tap + 1, group, c, within, H, W,
                C, OG, P, SH, SW, PH, PW, DH, DW, KW, K, LOGITS,
            )  # fmt: skip
            acc1 = tl.dot(d, a, acc1, input_precision=PRECISION)
            a = _column(
                xb, rb, row, column, pixel, live, tap + 2, group, c, within, H, W,
                C, OG, P, SH, SW, PH, PW, DH, DW, KW, K, LOGITS,
            )  # fmt: skip
            acc2 = tl.dot(d, a, acc2, input_precision=PRECISION)
    o = partial + ((split * G + g) * K + tap).to(tl.int64) * NG * CG + n[:, None] * CG + (c - g * CG)[None, :]
    tl.store(o, acc0, (n < NG)[:, None] & within)
    if TAPS == 3:
        tl.store(o + NG * CG, acc1, (n < NG)[:, None] & within)
        tl.store(o + 2 * NG * CG, acc2, (n < NG)[:, None] & within)
