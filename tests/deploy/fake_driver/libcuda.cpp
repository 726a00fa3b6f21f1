// A CUDA driver for a machine without a GPU: memory is the host's, and a launch computes at once, in plain loops, what
// the kernel of that name does with the arguments that it gets. "Code" is text that says which kernel it is. So what is
// checked is all that the plugin does around its kernels: which it takes, its arguments, workspace and programs.
// FAKE_CAPABILITY (90): compute capability; FAKE_FAIL: name of the function that fails; FAKE_LOG: file that each launch
// leaves a line in.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

bool fails(char const *name) {
  char const *wanted = getenv("FAKE_FAIL");
  return wanted && !strcmp(wanted, name);
}

float number(void const *p, int64_t i, int type) {  // 0 float, 1 half, 7 bfloat16
  if (type == 0) return static_cast<float const *>(p)[i];
  uint16_t const bits = static_cast<uint16_t const *>(p)[i];
  if (type == 1) {
    _Float16 h;
    memcpy(&h, &bits, 2);
    return static_cast<float>(h);
  }
  uint32_t const wide = uint32_t{bits} << 16;
  float f;
  memcpy(&f, &wide, 4);
  return f;
}

void store(void *p, int64_t i, int type, float value) {
  if (type == 0) {
    static_cast<float *>(p)[i] = value;
  } else if (type == 1) {
    auto const h = static_cast<_Float16>(value);
    memcpy(static_cast<uint16_t *>(p) + i, &h, 2);
  } else {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    static_cast<uint16_t *>(p)[i] = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

struct Kernel {  // what the text says
  std::string name;
  int kind = 0, type = 0, fixed = 0, numbers[15] = {}, patch = 0, across = 0, outputs = 0, shared = 0, threads = 0;
};

struct Launch {
  unsigned x, y, z;
};
struct Layer {
  int C, N, CG, NG, CO, CS, OG, K, KW, SH, SW, PH, PW, DH, DW;
};

float sample(void const *x, int type, int64_t image, int c, int C, int H, int W, float y, float u) {
  if (!(y >= -1 && y < H && u >= -1 && u < W)) return 0;
  int const y0 = static_cast<int>(std::floor(y)), x0 = static_cast<int>(std::floor(u));
  float const ly = y - y0, lx = u - x0;
  float sum = 0;
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++)
      if (y0 + i >= 0 && y0 + i < H && x0 + j >= 0 && x0 + j < W)
        sum += (i ? ly : 1 - ly) * (j ? lx : 1 - lx) * number(x, ((image * H + y0 + i) * W + x0 + j) * C + c, type);
  return sum;
}

void deform_conv(Kernel const &k, Launch grid, void **p) {
  auto pointer = [&](int i) { return *static_cast<void **>(p[i]); };
  auto integer = [&](int i) { return *static_cast<int *>(p[i]); };
  void *x = pointer(0), *offset = pointer(1), *mask = pointer(2), *weight = pointer(3), *bias = pointer(4), *out = pointer(5);
  int const B = integer(6), H = integer(7), W = integer(8), Ho = integer(9), Wo = integer(10), has_bias = integer(11);
  Layer l;
  if (k.fixed)
    memcpy(&l, k.numbers, sizeof l);
  else
    for (int i = 0; i < 15; i++) (&l.C)[i] = integer(12 + i);
  bool const partial = k.kind == 1;
  // every output of the patches, once
  unsigned const down = k.patch / k.across, blocks = (l.NG + k.outputs - 1) / k.outputs;
  if (grid.x != B * ((Wo + k.across - 1) / k.across) * ((Ho + down - 1) / down) * blocks) abort();
  if (grid.y != static_cast<unsigned>(l.C / l.CG) || (!partial && grid.z != 1)) abort();
  int64_t const plane = int64_t{Ho} * Wo;
  for (unsigned share = 0; share < grid.z; share++)
    for (int64_t b = 0; b < B; b++)
      for (int64_t pixel = 0; pixel < plane; pixel++)
        for (int n = 0; n < l.N; n++) {
          int const g = n / l.NG, row = static_cast<int>(pixel / Wo), column = static_cast<int>(pixel % Wo);
          float sum = 0;
          for (int c = g * l.CG; c < (g + 1) * l.CG; c++)
            for (int tap = share; tap < l.K; tap += grid.z) {
              int64_t const t = c / l.CO * l.K + tap, pairs = b * 2 * l.OG * l.K;
              float const dy = number(offset, (pairs + 2 * t) * plane + pixel, k.type);
              float const dx = number(offset, (pairs + 2 * t + 1) * plane + pixel, k.type);
              float const m = number(mask, (b * l.OG * l.K + t) * plane + pixel, k.type);
              float const y = row * l.SH - l.PH + tap / l.KW * l.DH + dy, u = column * l.SW - l.PW + tap % l.KW * l.DW + dx;
              float const w = number(weight, ((int64_t{g} * l.CG + c - g * l.CG) * l.K + tap) * l.NG + n - g * l.NG, k.type);
              sum += sample(x, k.type, b, c, l.C, H, W, y, u) * m * w;
            }
          int64_t const at = (b * plane + pixel) * l.N + n;
          if (partial)
            static_cast<float *>(out)[share * B * plane * l.N + at] = sum;
          else
            store(out, at, k.type, sum + (has_bias ? number(bias, n, k.type) : 0));
        }
}

void add_up(Kernel const &k, Launch grid, void **p) {
  auto pointer = [&](int i) { return *static_cast<void **>(p[i]); };
  int const shares = *static_cast<int *>(p[3]), N = *static_cast<int *>(p[5]), has_bias = *static_cast<int *>(p[6]);
  int64_t const size = *static_cast<int64_t *>(p[4]);
  if (grid.x != (size + 1023) / 1024) abort();
  for (int64_t i = 0; i < size; i++) {
    float sum = has_bias ? number(pointer(1), i % N, k.type) : 0;
    for (int s = 0; s < shares; s++) sum += static_cast<float *>(pointer(0))[s * size + i];
    store(pointer(2), i, k.type, sum);
  }
}

void transpose(Kernel const &k, Launch grid, void **p) {
  auto pointer = [&](int i) { return *static_cast<char **>(p[i]); };
  int const R = *static_cast<int *>(p[2]), S = *static_cast<int *>(p[3]), bytes = k.type == 0 ? 4 : 2;
  int64_t const tiles = int64_t{(R + 31) / 32} * ((S + 31) / 32);
  if (grid.x % tiles) abort();
  for (int64_t b = 0; b < grid.x / tiles; b++)
    for (int64_t r = 0; r < R; r++)
      for (int64_t s = 0; s < S; s++)
        memcpy(pointer(1) + ((b * S + s) * R + r) * bytes, pointer(0) + ((b * R + r) * S + s) * bytes, bytes);
}

}  // namespace

EXPORTED int cuGetErrorString(int, char const **text) { return *text = "made to fail", 0; }
EXPORTED int cuCtxGetDevice(int *device) { return *device = 0, fails("cuCtxGetDevice"); }
EXPORTED int cuDeviceGetAttribute(int *value, int attribute, int) {
  char const *given = getenv("FAKE_CAPABILITY");
  int const capability = given ? atoi(given) : 90;
  *value = attribute == 75 ? capability / 10 : capability % 10;
  return 0;
}

EXPORTED int cuLibraryLoadData(void **library, void const *code, void *, void *, unsigned, void *, void *, unsigned) {
  if (fails("cuLibraryLoadData")) return 1;
  auto *k = new Kernel;
  char name[64];
  int used = 0;
  auto const *text = static_cast<char const *>(code);
  if (sscanf(text, "KERNEL %63s %d %d %d %d %d %d %d %d%n", name, &k->kind, &k->type, &k->fixed, &k->patch, &k->across,
             &k->outputs, &k->shared, &k->threads, &used) != 9)
    return 2;
  k->name = name;
  for (int i = 0, more; i < 15 && k->fixed; i++, used += more)
    if (sscanf(text + used, " %d%n", &k->numbers[i], &more) != 1) return 3;
  *library = k;
  return 0;
}
EXPORTED int cuLibraryUnload(void *library) { return delete static_cast<Kernel *>(library), 0; }
EXPORTED int cuLibraryGetKernel(void **kernel, void *library, char const *name) {
  *kernel = library;
  return static_cast<Kernel *>(library)->name != name;
}
EXPORTED int cuKernelGetFunction(void **function, void *kernel) { return *function = kernel, 0; }
EXPORTED int cuFuncSetAttribute(void *function, int attribute, int value) {
  return attribute != 8 || value != static_cast<Kernel *>(function)->shared;
}
EXPORTED int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                            unsigned shared, void *stream, void **parameters, void **) {
  if (fails("cuLaunchKernel")) return 4;
  Kernel const &k = *static_cast<Kernel *>(function);
  if (char const *log = getenv("FAKE_LOG"))
    if (FILE *file = fopen(log, "a")) {
      fprintf(file, "%s %d %d %u %u %u %zu\n", k.name.c_str(), k.kind, k.fixed, x, y, z, (size_t)stream);
      fclose(file);
    }
  if (int(bx) != k.threads || by != 1 || bz != 1 || int(shared) != k.shared) return 5;
  Launch const grid{x, y, z};
  if (k.kind == 2)
    add_up(k, grid, parameters);
  else if (k.kind == 3)
    transpose(k, grid, parameters);
  else
    deform_conv(k, grid, parameters);
  return 0;
}
