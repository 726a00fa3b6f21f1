// The columns of a tile, some channels of all nine taps at a time: what the weights are multiplied with.
// Compiled with -D CHANNELS: 16 or 32.
#pragma once
#include "sample.cuh"

constexpr int COLUMNS = K * CHANNELS, LANES = CHANNELS / 8;
constexpr int CS = COLUMNS + 8;  // stride of a row in shared memory, without bank conflicts

struct Placed {  // the samples of a tile
  alignas(16) Weights weights[S];
  int codes[S];
};

template <int SIZE>
DEVICE void place_samples(Placed &to, const Args &a, const Tile &tile, int thread) {
  for (int s = thread; s < S; s += SIZE) {
    int y, x;
    Sample r = place(a, tile, s, y, x);
    to.codes[s] = r.code;
    to.weights[s] = weights(r);
  }
}

// columns (M, CS) of CHANNELS channels from c on; image: x of the tile's image. Zero beyond the last channel.
template <int SIZE>
DEVICE void gather(u16 *columns, const Placed &from, const u16 *image, int c, int W, int thread) {
#pragma unroll 2
  for (int i = thread; i < LANES * S; i += SIZE) {
    int s = i / LANES, part = i % LANES * 8;
    Corners q(image, c + part < C ? from.codes[s] : 0, c + part, W);
    *(Half8 *)(columns + s % M * CS + s / M * CHANNELS + part) = blend(q, from.weights[s]);
  }
}
