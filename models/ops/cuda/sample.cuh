// Where a tap of a 3x3 deformable convolution reads, and what it reads there.
// Compiled with -D C N SH SW PH PW DH DW LOGITS RAW: channels, outputs, stride, padding, dilation; whether masks are logits;
// the dtype of the offsets (0 float16, 1 bfloat16, 2 float32). Channels-last everywhere.
#pragma once
#include "device.cuh"

constexpr int K = 9, P = 3 * K;
constexpr int M = 64;       // outputs of a tile, 8 x 8
constexpr int S = K * M;    // its samples; sample s is tap s / M of output s % M

struct Args {  // pointers that a kernel does not use are null
  const u16 *x;         // (images, H, W, C)
  const void *raw;      // (images, Ho, Wo, P)
  const u16 *weight;    // packed in the order of the tensor cores' fragments
  const u16 *grad;      // (images, Ho, Wo, N), or of the columns (images, Ho, Wo, K, C)
  u16 *out;             // columns (images, Ho, Wo, K, C), or grad of x (images, H, W, C)
  float *sums;          // grad of x (images, H, W, C), zero at first
  void *grad_raw;       // (images, Ho, Wo, P)
  int *state;           // counters, zero at first
  int H, W, Ho, Wo;
  int tiles;            // in all images together
  int images, group;    // how many; how many of them share a slot of a ring
};

struct Tile {
  int row, column;  // of its first output
  i64 image;
  DEVICE Tile(int index, const Args &a) {
    int across = (a.Wo + 7) / 8, down = (a.Ho + 7) / 8;
    image = index / (across * down);
    int rest = index % (across * down);
    row = rest / across * 8;
    column = rest % across * 8;
  }
  DEVICE bool has(int m, const Args &a) const { return row + m / 8 < a.Ho && column + m % 8 < a.Wo; }
  DEVICE int pixel(int m, const Args &a) const { return (row + m / 8) * a.Wo + column + m % 8; }  // in the image
};

DEVICE float read_raw(const void *raw, i64 i) {
#if RAW == 2
  return ((const float *)raw)[i];
#elif RAW == 1
  return as_float((u32)((const u16 *)raw)[i] << 16);
#else
  return half_to_float(((const u16 *)raw)[i]);
#endif
}

DEVICE void write_raw(void *raw, i64 i, float value) {
#if RAW == 2
  ((float *)raw)[i] = value;
#elif RAW == 1
  ((u16 *)raw)[i] = float_to_bfloat(value);
#else
  ((u16 *)raw)[i] = float_to_half(value);
#endif
}

enum { TOP = 1, BOTTOM = 2, LEFT = 4, RIGHT = 8 };  // rows and columns around a sample that the image has

struct alignas(16) Sample {
  int code;            // (y0 * W + x0) * 16 + the corners' bits; without bits it reads nothing
  float ly, lx, mask;  // fractions; mask is NaN where an offset is
};

DEVICE int corner(int code) { return code >> 4; }
DEVICE bool has_corner(int code, int bits) { return (code & bits) == bits; }

// A sample counts where -1 <= y < H and -1 <= x < W; comparisons with NaN fail, so that nothing is read.
// y0, x0: the upper left corner of the four pixels around it.
DEVICE Sample place(const Args &a, const Tile &tile, int s, int &y0, int &x0) {
  int tap = s / M, m = s % M;
  Sample r = {0, 0.f, 0.f, 0.f};
  y0 = x0 = 0;
  if (!tile.has(m, a)) return r;
  i64 at = (tile.image * a.Ho * a.Wo + tile.pixel(m, a)) * P;
  float dy = read_raw(a.raw, at + 2 * tap), dx = read_raw(a.raw, at + 2 * tap + 1);
  r.mask = read_raw(a.raw, at + 2 * K + tap);
  if (LOGITS) r.mask = 1.f / (1.f + expf(-r.mask));
  int row = (tile.row + m / 8) * SH - PH + tap / 3 * DH, column = (tile.column + m % 8) * SW - PW + tap % 3 * DW;
  if (!(dy == dy && dx == dx)) r.mask = as_float(0x7fc00000u);
  bool inside = dy >= (float)(-1 - row) && dy < (float)(a.H - row) && dx >= (float)(-1 - column) && dx < (float)(a.W - column);
  if (!inside) return r;
  float fy = floorf(dy), fx = floorf(dx);  // of the offsets, as in dcn_kernels.py
  y0 = row + (int)fy;
  x0 = column + (int)fx;
  r.ly = dy - fy;
  r.lx = dx - fx;
  r.code = (y0 * a.W + x0) * 16 + (y0 >= 0 ? TOP : 0) + (y0 + 1 < a.H ? BOTTOM : 0) + (x0 >= 0 ? LEFT : 0) +
           (x0 + 1 < a.W ? RIGHT : 0);
  return r;
}

struct alignas(16) Weights {  // of the four corners, mask included; 0 where the image has none; NaN for a NaN offset
  float w[4];
};

DEVICE Weights weights(const Sample &r) {
  Weights v;
  v.w[0] = (has_corner(r.code, TOP | LEFT) ? (1.f - r.ly) * (1.f - r.lx) : 0.f) * r.mask;
  v.w[1] = (has_corner(r.code, TOP | RIGHT) ? (1.f - r.ly) * r.lx : 0.f) * r.mask;
  v.w[2] = (has_corner(r.code, BOTTOM | LEFT) ? r.ly * (1.f - r.lx) : 0.f) * r.mask;
  v.w[3] = (has_corner(r.code, BOTTOM | RIGHT) ? r.ly * r.lx : 0.f) * r.mask;
  return v;
}

// The corners' channels c to c + 7; image: x of one image.
struct Corners {
  Half8 v[4];
  DEVICE Corners(const u16 *image, int code, int c, int W) {
    const u16 *p = image + (i64)corner(code) * C + c;
    v[0] = load8(p, has_corner(code, TOP | LEFT));
    v[1] = load8(p + C, has_corner(code, TOP | RIGHT));
    v[2] = load8(p + (i64)W * C, has_corner(code, BOTTOM | LEFT));
    v[3] = load8(p + (i64)W * C + C, has_corner(code, BOTTOM | RIGHT));
  }
};

DEVICE Half8 blend(const Corners &q, const Weights &u) {
  Half8 sum;
  for (int i = 0; i < 4; i++) {
    float a = u.w[0] * low(q.v[0].pair[i]), b = u.w[0] * high(q.v[0].pair[i]);
    for (int j = 1; j < 4; j++) {
      a += u.w[j] * low(q.v[j].pair[i]);
      b += u.w[j] * high(q.v[j].pair[i]);
    }
    sum.pair[i] = pack(a, b);
  }
  return sum;
}
