// What models/ops/cuda/device.cuh asks of a GPU, on a CPU, so that its kernels can be run and checked where no GPU is.
// A block's threads are fibers of one thread; they change at barriers. Blocks run one after another.
#pragma once
#include <math.h>  // C headers only: the kernels' constants are macros called C and N
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define DEVICE inline
#define SHARED extern char
#define KERNEL(threads, blocks) \
  constexpr int LAUNCH_THREADS = threads; \
  extern "C" void

struct uint2 {
  u32 x, y;
};
struct Index {
  int x, y;
};

alignas(16) char memory[256 << 10];
static Index threadIdx, blockIdx, gridDim;

namespace fibers {
struct Barrier {
  int size = 0, waiting = 0, turn = 0;
};
struct Warp {
  Barrier barrier;
  u32 value[32][12];
};
static ucontext_t scheduler, contexts[1024];
static bool finished[1024];
static Barrier block;
static Warp warps[32];
static char *stacks;
static int threads;
static void (*body)();

inline void yield() {
  int me = threadIdx.x;
  swapcontext(&contexts[me], &scheduler);
}
inline void wait(Barrier &b) {
  int turn = b.turn;
  if (++b.waiting == b.size) {
    b.waiting = 0;
    b.turn++;
    return;
  }
  while (b.turn == turn) yield();
}
inline Warp &warp() { return warps[threadIdx.x / 32]; }
static void start() {
  body();
  finished[threadIdx.x] = true;
  yield();
}
inline void run_block(int count, void (*kernel)()) {
  constexpr int STACK = 64 << 10;
  threads = count;
  body = kernel;
  if (!stacks) stacks = (char *)malloc(1024 * (size_t)STACK);
  block = Barrier{count};
  for (int t = 0; t < count; t++) {
    warps[t / 32].barrier = Barrier{32};
    finished[t] = false;
    getcontext(&contexts[t]);
    contexts[t].uc_stack.ss_sp = &stacks[(size_t)t * STACK];
    contexts[t].uc_stack.ss_size = STACK;
    contexts[t].uc_link = nullptr;
    makecontext(&contexts[t], start, 0);
  }
  for (int left = count; left;) {
    left = 0;
    for (int t = 0; t < count; t++)
      if (!finished[t]) {
        threadIdx.x = t;
        swapcontext(&scheduler, &contexts[t]);
        left += !finished[t];
      }
  }
}
}  // namespace fibers

DEVICE float as_float(u32 bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
DEVICE u32 as_bits(float value) {
  u32 bits;
  memcpy(&bits, &value, 4);
  return bits;
}
DEVICE float half_to_float(u16 half) {
  _Float16 h;
  memcpy(&h, &half, 2);
  return (float)h;
}
DEVICE u16 float_to_half(float value) {
  _Float16 h = (_Float16)value;
  u16 half;
  memcpy(&half, &h, 2);
  return half;
}
DEVICE u16 float_to_bfloat(float value) {
  if (value != value) return 0x7fff;
  u32 bits = as_bits(value);
  return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#if BF16
DEVICE float to_float(u16 v) { return as_float((u32)v << 16); }
DEVICE u16 from_float(float v) { return float_to_bfloat(v); }
#else
DEVICE float to_float(u16 v) { return half_to_float(v); }
DEVICE u16 from_float(float v) { return float_to_half(v); }
#endif
DEVICE float low(u32 pair) { return to_float((u16)pair); }
DEVICE float high(u32 pair) { return to_float((u16)(pair >> 16)); }
DEVICE u32 pack(float first, float second) { return from_float(first) | (u32)from_float(second) << 16; }

DEVICE void barrier() { fibers::wait(fibers::block); }
DEVICE void warp_barrier() { fibers::wait(fibers::warp().barrier); }

// Every lane shows `words` words to the others and gets the table of all lanes' words.
struct Shown {
  u32 (*table)[12];
  Shown(const void *own, int words) {
    table = fibers::warp().value;
    memcpy(table[threadIdx.x % 32], own, 4 * words);
    warp_barrier();
  }
  ~Shown() { warp_barrier(); }
};

// The layouts of PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
DEVICE void mma(float (&d)[4], const u32 (&a)[4], const u32 *b) {
  u32 own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  Shown all(own, 6);
  int lane = threadIdx.x % 32;
  for (int e = 0; e < 4; e++) {
    int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    for (int k = 0; k < 16; k++) {
      u32 x = all.table[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      u32 y = all.table[column * 4 + k % 8 / 2][4 + k / 8];
      d[e] += (k % 2 ? high(x) : low(x)) * (k % 2 ? high(y) : low(y));
    }
  }
}
DEVICE void load_matrices(u32 *to, const u16 *row) {
  Shown all(&row, 2);
  int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; i++) {
    const u16 *from;
    memcpy(&from, all.table[i * 8 + lane / 4], 8);
    memcpy(&to[i], from + lane % 4 * 2, 4);
  }
}
DEVICE void add4(float *to, float a, float b, float c, float d) { to[0] += a, to[1] += b, to[2] += c, to[3] += d; }
DEVICE int shared_add(int *to, int value) {
  int before = *to;
  *to += value;
  return before;
}
DEVICE float from_lane_xor(float value, int lane) {
  Shown all(&value, 1);
  return as_float(all.table[threadIdx.x % 32 ^ lane][0]);
}
DEVICE int from_lane_below(int value, int by) {
  Shown all(&value, 1);
  int lane = threadIdx.x % 32;
  return (int)all.table[lane < by ? lane : lane - by][0];
}
DEVICE void fetch16(void *to, const void *from) { memcpy(to, from, 16); }
DEVICE void arrived() {}
DEVICE Half8 load8(const u16 *from, bool there) {
  Half8 v = {{0, 0, 0, 0}};
  return there ? *(const Half8 *)from : v;
}
// Blocks run one after another, in order, so that nothing is ever waited for.
DEVICE void await(const int *counter, int target) {
  if (*counter < target) abort();
  barrier();
}
DEVICE void signal(int *counter) {
  barrier();
  if (threadIdx.x == 0) ++*counter;
}
DEVICE int next_ticket(int *counter) {
  static int ticket;
  if (threadIdx.x == 0) ticket = (*counter)++;
  barrier();
  return ticket;
}
struct alignas(16) Float4 {
  float v[4];
};
DEVICE Float4 load_fresh(const float *from) { return *(const Float4 *)from; }
