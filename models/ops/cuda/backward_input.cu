// Gradients of the offsets and masks, complete, and of x, added to float32 sums.
// Compiled with -D CHANNELS HALO NEED_X FUSED RING SPLIT BLOCKS: channels of a step; pixels around a tile's undeformed footprint;
// whether x's gradient is wanted; whether D is computed here; whether the sums lie in a ring; warps that share a tap; blocks wanted on a multiprocessor.
//
// D = grad . weight (pixels, K, C) is the gradient that the columns would have. FUSED computes it here, from grad; otherwise
// it comes from a matrix product, in place of grad. A block owns a tile of 8 x 8 outputs, a warp the samples of one tap.
// Products of D with the four corners give the gradients of offset and mask. For x, the samples are sorted by the pixels
// they touch, once a tile: each pixel of the window around the tile gathers its contributions in registers, so that one
// atomic addition a pixel and channel leaves the multiprocessor instead of one a sample, corner and channel. Samples
// beyond the window go out one by one.
//
// RING: float32 sums of all images would be twice as large as x. They lie in three slots, for a group of images each. Blocks
// of group g first turn their share of group g - 2, complete by then, into x's gradient and clear it for group g + 1. Blocks
// are numbered by a ticket, so that one waits only for blocks that have started before it. Two more groups of blocks, without
// tiles, turn the last two.
#include "sample.cuh"

constexpr int WARPS = K * SPLIT, THREADS = 32 * WARPS, ROWS = M / SPLIT, BLOCKS_M = ROWS / 16;
constexpr int NS = N + 8, DS = CHANNELS + 8;  // strides of rows in shared memory, without bank conflicts
constexpr int LANES = CHANNELS / 8, STEPS = (C + CHANNELS - 1) / CHANNELS;
constexpr int WH = 7 * SH + 2 * DH + 2 + 2 * HALO, WW = 7 * SW + 2 * DW + 2 + 2 * HALO, PX = WH * WW;
constexpr u16 NOWHERE = 0xffff, STRAY = 0xfffe;

struct Entry {
  float weight;
  int sample;
};

struct Shared {
#if FUSED
  alignas(16) u16 grad[M * NS];
#endif
  alignas(16) u16 d[S * DS];
  alignas(16) Sample samples[S];
  float sums[3 * S];
#if NEED_X
  alignas(8) Entry entries[4 * S];
  int ends[PX];  // entries of window pixel p: from ends[p - 1] to ends[p]
  u16 cells[S];  // window pixel of a sample's upper left corner
  u16 strays[S];
  int stray_count, total[WARPS];
#endif
};

#if NEED_X
// Exclusive prefix sums of sh.ends, in place: each thread sums a run, warps and then runs are offset.
DEVICE void prefix_sums(Shared &sh, int thread) {
  constexpr int RUN = (PX + THREADS - 1) / THREADS;
  int own[RUN], sum = 0;
  for (int i = 0; i < RUN; i++) {
    int p = thread * RUN + i;
    own[i] = p < PX ? sh.ends[p] : 0;
    sum += own[i];
  }
  int upto = sum;
  for (int by = 1; by < 32; by *= 2) {
    int below = from_lane_below(upto, by);
    if (thread % 32 >= by) upto += below;
  }
  if (thread % 32 == 31) sh.total[thread / 32] = upto;
  barrier();
  int start = upto - sum;
  for (int w = 0; w < thread / 32; w++) start += sh.total[w];
  for (int i = 0; i < RUN; i++) {
    int p = thread * RUN + i;
    if (p < PX) sh.ends[p] = start;
    start += own[i];
  }
}

constexpr int NEXT[4] = {0, 1, WW, WW + 1};  // window pixels of the corners, from the upper left

DEVICE void sort_samples(Shared &sh, int thread) {
  for (int s = thread; s < S; s += THREADS) {
    int cell = sh.cells[s];
    if (cell == STRAY) sh.strays[shared_add(&sh.stray_count, 1)] = s;
    if (cell >= STRAY) continue;
    Weights u = weights(sh.samples[s]);
    for (int i = 0; i < 4; i++)
      if (u.w[i] != 0.f) shared_add(&sh.ends[cell + NEXT[i]], 1);
  }
  barrier();
  prefix_sums(sh, thread);
  barrier();
  for (int s = thread; s < S; s += THREADS) {
    int cell = sh.cells[s];
    if (cell >= STRAY) continue;
    Weights u = weights(sh.samples[s]);
    for (int i = 0; i < 4; i++)
      if (u.w[i] != 0.f) sh.entries[shared_add(&sh.ends[cell + NEXT[i]], 1)] = Entry{u.w[i], s};
  }
}
#endif

DEVICE void place_samples(Shared &sh, const Args &a, const Tile &tile, int thread) {
  for (int s = thread; s < S; s += THREADS) {
    int y, x;
    Sample r = place(a, tile, s, y, x);
    sh.samples[s] = r;
    sh.sums[s] = sh.sums[S + s] = sh.sums[2 * S + s] = 0.f;
#if NEED_X
    y -= tile.row * SH - PH - HALO;
    x -= tile.column * SW - PW - HALO;
    bool inside = y >= 0 && y < WH - 1 && x >= 0 && x < WW - 1;
    sh.cells[s] = (r.code & 15) == 0 ? NOWHERE : inside ? y * WW + x : STRAY;
#endif
  }
#if NEED_X
  for (int p = thread; p < PX; p += THREADS) sh.ends[p] = 0;
  if (thread == 0) sh.stray_count = 0;
#endif
}

#if FUSED
DEVICE void load_grad(Shared &sh, const Args &a, const Tile &tile, int thread) {
  const u16 *grad = a.grad + tile.image * a.Ho * a.Wo * N;
  for (int i = thread; i < M * (N / 8); i += THREADS) {
    int m = i / (N / 8), n = i % (N / 8) * 8;
    Half8 *to = (Half8 *)(sh.grad + m * NS + n);
    if (tile.has(m, a)) fetch16(to, grad + (i64)tile.pixel(m, a) * N + n);
    else *to = Half8{{0, 0, 0, 0}};
  }
}

// D of the warp's samples for this step's channels: (ROWS, N) . (N, CHANNELS), into shared memory.
DEVICE void multiply(Shared &sh, const u16 *weight, int step, int tap, int first, int lane) {
  float sum[BLOCKS_M][LANES][4];
  for (int i = 0; i < BLOCKS_M; i++)
    for (int j = 0; j < LANES; j++)
      for (int e = 0; e < 4; e++) sum[i][j][e] = 0.f;
  const uint2 *fragment = (const uint2 *)weight + ((i64)tap * STEPS + step) * LANES * (N / 16) * 32 + lane;
#pragma unroll 2
  for (int k = 0; k < N / 16; k++) {
    uint2 b[LANES];
    for (int j = 0; j < LANES; j++) b[j] = fragment[(j * (N / 16) + k) * 32];
    for (int i = 0; i < BLOCKS_M; i++) {
      u32 rows[4];
      load_matrices(rows, sh.grad + (first + 16 * i + lane % 16) * NS + k * 16 + lane / 16 * 8);
      for (int j = 0; j < LANES; j++) mma(sum[i][j], rows, (const u32 *)&b[j]);
    }
  }
  for (int i = 0; i < BLOCKS_M; i++)
    for (int j = 0; j < LANES; j++) {
      u16 *to = sh.d + (tap * M + first + 16 * i + lane / 4) * DS + j * 8 + lane % 4 * 2;
      *(u32 *)to = pack(sum[i][j][0], sum[i][j][1]);
      *(u32 *)(to + 8 * DS) = pack(sum[i][j][2], sum[i][j][3]);
    }
}
#endif

// D of sample s, channels c to c + 7; in shared memory afterwards.
DEVICE Half8 read_d(Shared &sh, const Args &a, const Tile &tile, int s, int c, bool there) {
  Half8 *at = (Half8 *)(sh.d + s * DS + c % CHANNELS);
#if FUSED
  return *at;
#else
  const u16 *image = a.grad + tile.image * a.Ho * a.Wo * K * C;
  Half8 d = load8(image + ((i64)tile.pixel(s % M, a) * K + s / M) * C + c, there);
  *at = d;
  return d;
#endif
}

// What this step's channels add to the gradients of mask, y and x (times mask) of the warp's samples.
DEVICE void reduce_samples(Shared &sh, const Args &a, const Tile &tile, int step, int tap, int first, int lane) {
  int c = step * CHANNELS + lane % LANES * 8;
  const u16 *image = a.x + tile.image * a.H * a.W * C;
#pragma unroll 2
  for (int m = first + lane / LANES; m < first + ROWS; m += 32 / LANES) {
    int s = tap * M + m;
    bool there = c < C && tile.has(m, a);
    Sample r = sh.samples[s];
    Half8 d = read_d(sh, a, tile, s, c, there);
    Corners q(image, there ? r.code : 0, c, a.W);
    float dot[4] = {0.f, 0.f, 0.f, 0.f};
    for (int i = 0; i < 4; i++) {
      float even = low(d.pair[i]), odd = high(d.pair[i]);
      for (int j = 0; j < 4; j++) dot[j] += even * low(q.v[j].pair[i]) + odd * high(q.v[j].pair[i]);
    }
    float left = dot[0] + r.ly * (dot[2] - dot[0]), right = dot[1] + r.ly * (dot[3] - dot[1]);
    float top = dot[0] + r.lx * (dot[1] - dot[0]), bottom = dot[2] + r.lx * (dot[3] - dot[2]);
    float sums[3] = {top + r.ly * (bottom - top), bottom - top, right - left};
    for (int i = 0; i < 3; i++) {
      for (int by = 1; by < LANES; by *= 2) sums[i] += from_lane_xor(sums[i], by);
      if (lane % LANES == 0) sh.sums[i * S + s] += sums[i];
    }
  }
}

DEVICE void write_raw_gradients(Shared &sh, const Args &a, const Tile &tile, int thread) {
  for (int s = thread; s < S; s += THREADS) {
    int tap = s / M, m = s % M;
    if (!tile.has(m, a)) continue;
    float mask = sh.samples[s].mask, slope = LOGITS ? mask * (1.f - mask) : 1.f;
    i64 at = (tile.image * a.Ho * a.Wo + tile.pixel(m, a)) * P;
    write_raw(a.grad_raw, at + 2 * tap, sh.sums[S + s] * mask);
    write_raw(a.grad_raw, at + 2 * tap + 1, sh.sums[2 * S + s] * mask);
    write_raw(a.grad_raw, at + 2 * K + tap, sh.sums[s] * slope);
  }
}

#if NEED_X
struct Sum8 {
  float v[8];
  DEVICE Sum8() {
    for (int i = 0; i < 8; i++) v[i] = 0.f;
  }
  DEVICE void add(const Half8 &d, float weight) {
    for (int i = 0; i < 4; i++) {
      v[2 * i] += weight * low(d.pair[i]);
      v[2 * i + 1] += weight * high(d.pair[i]);
    }
  }
  DEVICE void send(float *to) const {
    add4(to, v[0], v[1], v[2], v[3]);
    add4(to + 4, v[4], v[5], v[6], v[7]);
  }
};

DEVICE void gather_window(const Shared &sh, const Args &a, const Tile &tile, float *sums, int step, int thread) {
  int part = thread % LANES * 8, c = step * CHANNELS + part;
  if (c >= C) return;
  int top = tile.row * SH - PH - HALO, left = tile.column * SW - PW - HALO;
  for (int p = thread / LANES; p < PX; p += THREADS / LANES) {
    int e = p ? sh.ends[p - 1] : 0, end = sh.ends[p];
    if (e == end) continue;
    Sum8 sum;
    for (; e < end; e++) {
      Entry entry = sh.entries[e];
      sum.add(*(const Half8 *)(sh.d + entry.sample * DS + part), entry.weight);
    }
    sum.send(sums + (i64)((top + p / WW) * a.W + left + p % WW) * C + c);
  }
}

DEVICE void scatter_strays(const Shared &sh, const Args &a, float *sums, int step, int thread) {
  int part = thread % LANES * 8, c = step * CHANNELS + part;
  if (c >= C) return;
  for (int i = thread / LANES; i < sh.stray_count; i += THREADS / LANES) {
    int s = sh.strays[i];
    Sample r = sh.samples[s];
    Weights u = weights(r);
    Half8 d = *(const Half8 *)(sh.d + s * DS + part);
    for (int j = 0; j < 4; j++) {
      if (u.w[j] == 0.f) continue;
      Sum8 sum;
      sum.add(d, u.w[j]);
      sum.send(sums + (i64)(corner(r.code) + j / 2 * a.W + j % 2) * C + c);
    }
  }
}
#endif

#if RING
struct Ring {
  const Args &a;
  int groups, per_group, g, position;
  bool has_tile;
  i64 slot;  // elements

  DEVICE Ring(const Args &a, int ticket) : a(a) {
    groups = (a.images + a.group - 1) / a.group;
    per_group = a.tiles / a.images * a.group;
    slot = (i64)a.group * a.H * a.W * C;
    has_tile = ticket < a.tiles;
    int rest = has_tile ? ticket : ticket - a.tiles;
    g = rest / per_group + (has_tile ? 0 : groups);
    position = rest % per_group;
  }
  DEVICE int blocks(int group) const { return group == groups - 1 ? a.tiles - group * per_group : per_group; }
  DEVICE int *added(int group) const { return a.state + 1 + group; }
  DEVICE int *turned(int group) const { return a.state + 1 + groups + group; }
  DEVICE float *sums(int group) const { return a.sums + group % 3 * slot; }

  // This block's share of group g - 2: to x's gradient; zeros in its place.
  DEVICE void turn(int thread) const {
    int group = g - 2;
    if (group < 0) return;
    await(added(group), blocks(group));
    int images = group == groups - 1 ? a.images - group * a.group : a.group;
    i64 eights = (i64)images * a.H * a.W * C / 8, share = (eights + blocks(g) - 1) / blocks(g);
    i64 end = (position + 1) * share < eights ? (position + 1) * share : eights;
    float *from = sums(group);
    u16 *to = a.out + group * slot;
    constexpr int BATCH = 4;  // loads in flight
    for (i64 i = position * share + thread; i < end; i += BATCH * THREADS) {
      Float4 f[BATCH][2];
      for (int b = 0; b < BATCH; b++)
        for (int half = 0; half < 2; half++)
          if (i + b * THREADS < end) f[b][half] = load_fresh(from + (i + b * THREADS) * 8 + 4 * half);
      for (int b = 0; b < BATCH; b++) {
        i64 at = (i + b * THREADS) * 8;
        if (i + b * THREADS >= end) break;
        Half8 h;
        for (int e = 0; e < 4; e++) h.pair[e] = pack(f[b][e / 2].v[e % 2 * 2], f[b][e / 2].v[e % 2 * 2 + 1]);
        *(Half8 *)(to + at) = h;
        *(Float4 *)(from + at) = *(Float4 *)(from + at + 4) = Float4{{0.f, 0.f, 0.f, 0.f}};
      }
    }
    signal(turned(group));
  }
  DEVICE void wait_for_slot() const {
    if (g >= 3) await(turned(g - 3), blocks(g - 1));
  }
};
#endif

KERNEL(THREADS, BLOCKS) backward_input(Args a) {
  SHARED memory[];
  Shared &sh = *(Shared *)memory;
  int thread = threadIdx.x, lane = thread % 32, tap = thread / 32 % K, first = thread / 32 / K * ROWS;
#if RING
  int ticket = next_ticket(a.state);
  Ring ring(a, ticket);
  ring.turn(thread);
  if (!ring.has_tile) return;
  Tile tile(ticket, a);
  float *sums = ring.sums(ring.g) + (tile.image - ring.g * a.group) * a.H * a.W * C;
#else
  Tile tile(blockIdx.x, a);
  float *sums = a.sums + tile.image * a.H * a.W * C;
#endif
  place_samples(sh, a, tile, thread);
#if FUSED
  load_grad(sh, a, tile, thread);
  arrived();
#endif
  barrier();
#if NEED_X
  sort_samples(sh, thread);
#endif
#if RING
  ring.wait_for_slot();
#endif
  for (int step = 0; step < STEPS; step++) {
#if FUSED
    multiply(sh, a.weight, step, tap, first, lane);
    warp_barrier();
#endif
    reduce_samples(sh, a, tile, step, tap, first, lane);
    barrier();
#if NEED_X
    gather_window(sh, a, tile, sums, step, thread);
    scatter_strays(sh, a, sums, step, thread);
    barrier();
#endif
  }
#if RING
  signal(ring.added(ring.g));
#endif
  write_raw_gradients(sh, a, tile, thread);
}
