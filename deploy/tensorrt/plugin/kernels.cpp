#include "kernels.h"

#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstring>

// Code of the kernels lies in kernels.S, whose labels the rows name.
#define ARRAY(...) {__VA_ARGS__}
#define ROW(architecture, type, kind, fixed, multiple, numbers, patch, across, outputs, name, shared, threads, image) \
  extern "C" unsigned char const image[];
#include "kernels.inc"
#undef ROW

namespace dcnv2 {
namespace {

#define ROW(architecture, type, kind, fixed, multiple, numbers, patch, across, outputs, name, shared, threads, image)   \
  {architecture, static_cast<Type>(type), static_cast<Kind>(kind), fixed != 0, multiple, numbers, patch, across, outputs, \
   #name, shared, threads, image},
Row const TABLE[] = {
#include "kernels.inc"
};
#undef ROW

#ifndef DCNV2_BUSY
#define DCNV2_BUSY 264
#endif
constexpr int64_t BUSY = DCNV2_BUSY;  // programs that keep a large GPU busy; with fewer, a program's taps are dealt out
constexpr int64_t SHARES = 3;  // fewest that pay: in two, 100 programs took 0.124 ms where one took 0.098 (H100)
constexpr int64_t TILE = 32;   // of a transposition
constexpr int64_t BLOCK = 1024;  // elements added up by a program
constexpr int ALIGNED = 8;

int64_t cdiv(int64_t a, int64_t b) noexcept { return (a + b - 1) / b; }
size_t aligned(int64_t bytes) noexcept { return static_cast<size_t>(cdiv(bytes, 256) * 256); }
int64_t out_elements(Layer const &l, Sizes const &s) noexcept { return s.B * s.Ho * s.Wo * l.N; }
int64_t x_elements(Layer const &l, Sizes const &s) noexcept { return s.B * s.H * s.W * l.C; }
int64_t weight_elements(Layer const &l) noexcept { return int64_t{l.N} * l.CG * l.K; }

int common_multiple(Layer const &layer) noexcept {
  int32_t const *numbers = &layer.C;
  for (int i = 0; i < CHANNELS; i++)
    if (numbers[i] % ALIGNED) return 1;
  return ALIGNED;
}

bool suits(Row const &row, Kind kind, Type type, Layer const &layer, int multiple) noexcept {
  if (row.kind != kind || row.type != type) return false;
  if (row.fixed) return !memcmp(row.numbers, &layer, sizeof layer);
  return multiple % row.multiple == 0;
}

// Code for 8.0 runs on 8.6, and so on; from 9.0 on it is for one architecture only.
bool runs_on(int code, int device) noexcept {
  if (device >= 90) return code == device;
  return code / 10 == device / 10 && code <= device;
}

}  // namespace

bool Message::failed(char const *format, ...) noexcept {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return false;
}

Computation::~Computation() noexcept {
  Loaded const *const all[] = {&forward_, &add_up_, &transposes_[0], &transposes_[1]};
  for (Loaded const *each : all)
    if (each->library) driver_->cuLibraryUnload(each->library);
}

Row const *Computation::find(Kind kind, int multiple) const noexcept {
  // any type of the elements' size will do to transpose
  Row const *best = nullptr;
  for (Row const &row : TABLE) {
    bool const same_size = kind == Kind::TRANSPOSE && bytes_of(row.type) == bytes_of(type_);
    Type const type = same_size ? row.type : type_;
    if (!runs_on(row.architecture, architecture_) || !suits(row, kind, type, layer_, multiple)) continue;
    // the newest architecture's first; within it the table is in the order of preference
    if (!best || row.architecture > best->architecture) best = &row;
  }
  return best;
}

bool Computation::load(Loaded &loaded, Row const *row, Message &message) noexcept {
  if (!row)
    return message.failed("the library has no kernel for compute capability %d.%d and this type; build it with --arch %d",
                          architecture_ / 10, architecture_ % 10, architecture_);
  if (loaded.row == row) return true;
  if (loaded.library) driver_->cuLibraryUnload(loaded.library);
  loaded = Loaded{};
  KernelHandle *kernel = nullptr;
  char const *step = "cuLibraryLoadData";
  Status status = driver_->cuLibraryLoadData(&loaded.library, row->image, nullptr, nullptr, 0, nullptr, nullptr, 0);
  if (!status) step = "cuLibraryGetKernel", status = driver_->cuLibraryGetKernel(&kernel, loaded.library, row->name);
  if (!status) step = "cuKernelGetFunction", status = driver_->cuKernelGetFunction(&loaded.function, kernel);
  if (!status)
    step = "cuFuncSetAttribute",
    status = driver_->cuFuncSetAttribute(loaded.function, MAX_DYNAMIC_SHARED, row->shared);
  if (status) {
    char const *text = "unknown error";
    driver_->cuGetErrorString(status, &text);
    return message.failed("%s of %s for %d: %s (%d)", step, row->name, row->architecture, text, status);
  }
  loaded.row = row;
  return true;
}

int64_t Computation::programs(Row const &row) const noexcept {
  int64_t const patches = sizes_.B * cdiv(sizes_.Wo, row.across) * cdiv(sizes_.Ho, row.patch / row.across);
  return patches * cdiv(layer_.NG, row.outputs);
}

bool Computation::prepare(Layer const &layer, Sizes const &sizes, Type type, bool linear, Message &message) noexcept {
  if (!driver_) {
    char const *reason = nullptr;
    driver_ = cuda_driver(&reason);
    if (!driver_) return message.failed("%s", reason);
  }
  Device device;
  int major = 0, minor = 0;
  if (driver_->cuCtxGetDevice(&device) || driver_->cuDeviceGetAttribute(&major, CAPABILITY_MAJOR, device) ||
      driver_->cuDeviceGetAttribute(&minor, CAPABILITY_MINOR, device))
    return message.failed("there is no current CUDA context");
  int64_t const largest_image = layer.C * sizes.H * sizes.W, raw = int64_t{2} * layer.OG * layer.K * sizes.Ho * sizes.Wo;
  if (largest_image > INT_MAX || raw > INT_MAX || sizes.B > INT_MAX || sizes.Ho * sizes.Wo > INT_MAX)
    return message.failed("an image of more than 2^31 elements");
  layer_ = layer, sizes_ = sizes, type_ = type, linear_ = linear, architecture_ = 10 * major + minor;

  int const multiple = common_multiple(layer);
  Row const *forward = find(Kind::FORWARD, multiple), *partial = find(Kind::PARTIAL, multiple);
  shares_ = 1;
  if (partial) {
    int64_t const few = BUSY / (programs(*partial) * (layer.C / layer.CG) + 1);
    shares_ = static_cast<int32_t>(few < SHARES ? 1 : few > layer.K ? layer.K : few);
  }
  if (!load(forward_, shares_ > 1 ? partial : forward, message)) return false;
  if (shares_ > 1 && !load(add_up_, find(Kind::ADD_UP, 1), message)) return false;
  if (!load(transposes_[0], find(Kind::TRANSPOSE, 1), message)) return false;
  return load(transposes_[1], find(Kind::TRANSPOSE, ALIGNED), message);
}

Workspace Computation::workspace() const noexcept {
  int64_t const bytes = bytes_of(type_), out = out_elements(layer_, sizes_);
  Workspace w{};
  w.x = aligned(weight_elements(layer_) * bytes);
  w.out = w.x + (linear_ ? aligned(x_elements(layer_, sizes_) * bytes) : 0);
  w.partial = w.out + (linear_ ? aligned(out * bytes) : 0);
  w.total = w.partial + (shares_ > 1 ? aligned(shares_ * out * 4) : 0);
  return w;
}

size_t Computation::workspace_bytes(Layer const &layer, Sizes const &most, Type type, bool linear) noexcept {
  Computation any;
  any.layer_ = layer, any.sizes_ = most, any.type_ = type, any.linear_ = linear;
  // smaller sizes may be dealt out where these are not: at most BUSY programs with all their outputs
  int64_t largest = 0, all = layer.K * out_elements(layer, most) * 4;
  for (Row const &row : TABLE)
    if (suits(row, Kind::PARTIAL, type, layer, common_multiple(layer))) {
      int64_t const bytes = BUSY * row.patch * row.outputs * 4;
      if (bytes > largest) largest = bytes;
    }
  return any.workspace().total + aligned(largest < all ? largest : all);
}

bool Computation::launch(Loaded const &loaded, int64_t x, int64_t y, int64_t z, void **parameters, void *stream,
                         Message &message) noexcept {
  Row const &row = *loaded.row;
  if (x > INT_MAX || y > 65535 || z > 65535) return message.failed("too large for one launch");
  Status const status = driver_->cuLaunchKernel(
      loaded.function, static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z),
      static_cast<unsigned>(row.threads), 1, 1, static_cast<unsigned>(row.shared), stream, parameters, nullptr);
  if (!status) return true;
  char const *text = "unknown error";
  driver_->cuGetErrorString(status, &text);
  return message.failed("cuLaunchKernel of %s for %d: %s (%d)", row.name, row.architecture, text, status);
}

Computation::Loaded &Computation::transposer(int64_t rows, int64_t columns) noexcept {
  return transposes_[rows % ALIGNED == 0 && columns % ALIGNED == 0];
}

// Triton's kernels take two more pointers, to memory of their own, which these do not ask for.
bool Computation::transpose(void const *source, void *target, int64_t batch, int64_t rows, int64_t columns,
                            void *stream, Message &message) noexcept {
  auto r = static_cast<int32_t>(rows), s = static_cast<int32_t>(columns);
  void *none = nullptr;
  void *parameters[] = {&source, &target, &r, &s, &none, &none};
  int64_t const tiles = cdiv(rows, TILE) * cdiv(columns, TILE);
  return launch(transposer(rows, columns), batch * tiles, 1, 1, parameters, stream, message);
}

bool Computation::run(Tensors const &t, void *stream, Message &message) noexcept {
  if (!forward_.row) return message.failed("enqueue before onShapeChange");
  int64_t size = out_elements(layer_, sizes_);
  if (!size) return true;
  Workspace const place = workspace();
  auto *const workspace = static_cast<char *>(t.workspace);
  int64_t const groups = layer_.C / layer_.CG;

  void const *weight = workspace + place.weight, *x = linear_ ? workspace + place.x : t.x;
  void const *bias = t.bias ? t.bias : t.weight;  // not read where there is none, but has to be something
  void *out = linear_ ? workspace + place.out : t.out;
  void *partial = workspace + place.partial;
  int32_t has_bias = t.bias != nullptr;
  if (!transpose(t.weight, workspace + place.weight, groups, layer_.NG, int64_t{layer_.CG} * layer_.K, stream, message))
    return false;
  if (linear_ && !transpose(t.x, workspace + place.x, sizes_.B, layer_.C, sizes_.H * sizes_.W, stream, message))
    return false;

  void const *offset = t.offset, *mask = t.mask;
  auto b = static_cast<int32_t>(sizes_.B), h = static_cast<int32_t>(sizes_.H), w = static_cast<int32_t>(sizes_.W);
  auto ho = static_cast<int32_t>(sizes_.Ho), wo = static_cast<int32_t>(sizes_.Wo);
  void *none = nullptr;
  void *parameters[12 + NUMBERS + 2] = {&x, &offset, &mask, &weight, &bias, shares_ > 1 ? &partial : &out,
                                        &b, &h,      &w,    &ho,     &wo,   &has_bias};
  int count = 12;
  if (!forward_.row->fixed)  // otherwise they are compiled in
    for (int i = 0; i < NUMBERS; i++) parameters[count++] = &layer_.C + i;
  parameters[count++] = &none, parameters[count++] = &none;
  if (!launch(forward_, programs(*forward_.row), groups, shares_, parameters, stream, message)) return false;

  if (shares_ > 1) {
    void *adding[] = {&partial, &bias, &out, &shares_, &size, &layer_.N, &has_bias, &none, &none};
    if (!launch(add_up_, cdiv(size, BLOCK), 1, 1, adding, stream, message)) return false;
  }
  return !linear_ || transpose(out, t.out, sizes_.B, sizes_.Ho * sizes_.Wo, layer_.N, stream, message);
}

}  // namespace dcnv2
