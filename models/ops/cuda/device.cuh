// What the kernels ask of the machine: pairs of 16-bit numbers, tensor cores, atomics. tests/models/emulator/ has the same on a CPU.
// Compiled with -D BF16=0|1: the 16-bit numbers are float16 or bfloat16. No header of the CUDA toolkit is needed.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

struct alignas(16) Half8 {  // eight 16-bit numbers, as four pairs
  u32 pair[4];
};

#ifdef EMULATE
#include "emulate.h"
#else

#define DEVICE __device__ __forceinline__
// The two constants are read by whoever launches the kernel.
#define KERNEL(threads, blocks)                                 \
  extern "C" __device__ const int SHARED_BYTES = sizeof(Shared); \
  extern "C" __device__ const int LAUNCH_THREADS = threads;      \
  extern "C" __global__ void __launch_bounds__(threads, blocks)
#define SHARED extern __shared__ __align__(16) char

#if BF16
DEVICE float low(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE u32 pack(float first, float second) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#else
DEVICE float low(u32 pair) {
  float value;
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(value) : "r"(pair));
  return value;
}
DEVICE float high(u32 pair) {
  float value;
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(value) : "r"(pair));
  return value;
}
DEVICE u32 pack(float first, float second) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#endif

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE float half_to_float(u16 half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}
DEVICE u16 float_to_half(float value) {
  u16 half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}
DEVICE u16 float_to_bfloat(float value) {
  u16 half;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}

// d (16 x 8) += a (16 x 16) . b (16 x 8), spread over a warp as PTX says for mma.m16n8k16
DEVICE void mma(float (&d)[4], const u32 (&a)[4], const u32 *b) {
  asm volatile(MMA " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// four 8 x 8 matrices whose rows lanes 0-7, 8-15, 16-23 and 24-31 point to, in shared memory
DEVICE void load_matrices(u32 *to, const u16 *row) {
  u32 at = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}

// four consecutive floats, 16-byte aligned, in global memory
DEVICE void add4(float *to, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#else
  atomicAdd(to, a), atomicAdd(to + 1, b), atomicAdd(to + 2, c), atomicAdd(to + 3, d);
#endif
}

DEVICE int shared_add(int *to, int value) { return atomicAdd(to, value); }
DEVICE float from_lane_xor(float value, int lane) { return __shfl_xor_sync(0xffffffffu, value, lane); }
DEVICE int from_lane_below(int value, int by) { return __shfl_up_sync(0xffffffffu, value, by); }
DEVICE void barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }

// Between blocks: what was written before signal() is seen after await() returned. All threads of the block call both.
DEVICE void await(const int *counter, int target) {
  if (threadIdx.x == 0) {
    int value;
    do asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    while (value < target);
  }
  __syncthreads();
}
DEVICE void signal(int *counter) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(counter, 1);
}
DEVICE int next_ticket(int *counter) {
  __shared__ int ticket;
  if (threadIdx.x == 0) ticket = atomicAdd(counter, 1);
  __syncthreads();
  return ticket;
}

struct alignas(16) Float4 {
  float v[4];
};
// past the L1 cache, which does not see what other multiprocessors add
DEVICE Float4 load_fresh(const float *from) {
  Float4 f;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(f.v[0]), "=f"(f.v[1]), "=f"(f.v[2]), "=f"(f.v[3]) : "l"(from) : "memory");
  return f;
}

// 16 bytes of memory that no kernel writes meanwhile, or zeros; no branch, and free to move ahead of stores
DEVICE Half8 load8(const u16 *from, bool there) {
  Half8 v;
  asm("{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
      "@p ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];}"
      : "=&r"(v.pair[0]), "=&r"(v.pair[1]), "=&r"(v.pair[2]), "=&r"(v.pair[3]) : "l"(from), "r"((u32)there));
  return v;
}

// 16 bytes from global to shared memory, in the background until arrived()
DEVICE void fetch16(void *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
DEVICE void arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#endif
