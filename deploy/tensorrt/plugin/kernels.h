// The kernels that the library holds, and how one layer is computed with them.
#pragma once
#include <cstddef>
#include <cstdint>

#include "driver.h"

namespace dcnv2 {

struct Message {  // what went wrong, for TensorRT's log
  char text[256] = "";
  bool failed(char const *format, ...) noexcept __attribute__((format(printf, 2, 3)));  // false, to be returned
};

// In the order of the kernel's parameters (NUMBERS of compile.py).
struct Layer {
  int32_t C, N;            // channels of x and of the output
  int32_t CG, NG;          // of a weight group
  int32_t CO, CS;          // of an offset group; of a segment, within which both groups are constant
  int32_t OG, K, KW;       // offset groups, taps, taps of a row
  int32_t SH, SW, PH, PW, DH, DW;
};
constexpr int NUMBERS = sizeof(Layer) / sizeof(int32_t), CHANNELS = 6;

struct Sizes {
  int64_t B, H, W, Ho, Wo;
};

enum class Type : int32_t { FLOAT = 0, HALF = 1, BF16 = 7 };  // TensorRT's numbers
inline int64_t bytes_of(Type type) noexcept { return type == Type::FLOAT ? 4 : 2; }

enum class Kind : int32_t { FORWARD, PARTIAL, ADD_UP, TRANSPOSE };

struct Row {  // of the table that compile.py writes
  int32_t architecture;
  Type type;
  Kind kind;
  bool fixed;        // for the one layer whose numbers follow
  int32_t multiple;  // of which all channels have to be one, or both sides of what is transposed
  int32_t numbers[NUMBERS];
  int32_t patch, across, outputs;  // of a program: positions, of which so many lie side by side; channels
  char const *name;
  int32_t shared, threads;
  unsigned char const *image;
};

struct Tensors {  // on the device; bias may be null
  void const *x, *offset, *mask, *weight, *bias;
  void *out, *workspace;
};

// Where in the workspace what lies, in bytes.
struct Workspace {
  size_t weight, x, out, partial, total;
};

// One layer on one device. Kernels are loaded by prepare(), so that run() only launches.
class Computation {
 public:
  Computation() = default;
  Computation(Computation const &) = delete;
  Computation &operator=(Computation const &) = delete;
  ~Computation() noexcept;

  // `linear`: x and out have TensorRT's linear format and are turned to channels-last in the workspace and back.
  bool prepare(Layer const &, Sizes const &, Type, bool linear, Message &) noexcept;
  bool run(Tensors const &, void *stream, Message &) noexcept;

  // Enough for any size up to `most`, on any device.
  static size_t workspace_bytes(Layer const &, Sizes const &most, Type, bool linear) noexcept;

 private:
  struct Loaded {
    Row const *row = nullptr;
    LibraryHandle *library = nullptr;
    FunctionHandle *function = nullptr;
  };
  Row const *find(Kind, int multiple) const noexcept;
  bool load(Loaded &, Row const *, Message &) noexcept;
  bool launch(Loaded const &, int64_t x, int64_t y, int64_t z, void **parameters, void *stream, Message &) noexcept;
  bool transpose(void const *, void *, int64_t batch, int64_t rows, int64_t columns, void *stream, Message &) noexcept;
  Loaded &transposer(int64_t rows, int64_t columns) noexcept;
  int64_t programs(Row const &) const noexcept;
  Workspace workspace() const noexcept;

  Driver const *driver_ = nullptr;
  Layer layer_{};
  Sizes sizes_{};
  Type type_ = Type::FLOAT;
  bool linear_ = false;
  int32_t shares_ = 1, architecture_ = 0;
  Loaded forward_, add_up_, transposes_[2];  // for any sides, for multiples of 8
};

}  // namespace dcnv2
