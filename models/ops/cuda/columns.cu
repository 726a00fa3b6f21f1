// out (pixels, K, C): the sample of every tap and channel, times its mask, for a matrix product to read.
// Compiled with -D CHANNELS THREADS BLOCKS: channels of a block, which its taps find in the L1 cache; its threads; blocks
// wanted on a multiprocessor. The grid is (tiles, blocks of channels).
#include "sample.cuh"

constexpr int LANES = CHANNELS / 8;

struct Shared {
  alignas(16) Weights weights[S];
  int codes[S];
};

KERNEL(THREADS, BLOCKS) columns(Args a) {
  SHARED memory[];
  Shared &sh = *(Shared *)memory;
  int thread = threadIdx.x, c = blockIdx.y * CHANNELS + thread % LANES * 8;
  Tile tile(blockIdx.x, a);
  for (int s = thread; s < S; s += THREADS) {
    int y, x;
    Sample r = place(a, tile, s, y, x);
    sh.codes[s] = r.code;
    sh.weights[s] = weights(r);
  }
  barrier();
  if (c >= C) return;
  const u16 *image = a.x + tile.image * a.H * a.W * C;
  u16 *out = a.out + tile.image * a.Ho * a.Wo * K * C;
#pragma unroll 2
  for (int s = thread / LANES; s < S; s += THREADS / LANES) {
    int tap = s / M, m = s % M;
    if (!tile.has(m, a)) continue;
    Corners q(image, sh.codes[s], c, a.W);
    *(Half8 *)(out + ((i64)tile.pixel(m, a) * K + tap) * C + c) = blend(q, sh.weights[s]);
  }
}
