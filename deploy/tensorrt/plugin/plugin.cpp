// DCNv2 for TensorRT: modulated deformable convolution in one kernel, without a column buffer.
//
// Inputs x (B, C, H, W), offset (B, 2*OG*K, Ho, Wo) in pixels, a (y, x) pair per tap, mask (B, OG*K, Ho, Wo), weight
// (N, C/groups, kh, kw) and, if there is one, bias (N), all of one type: float32, float16 or bfloat16. Output (B, N, Ho,
// Wo). Coordinates and sums are float32 whatever the type. x and the output may be channels-last.
#include <cstdio>
#include <cstring>
#include <new>
#include <numeric>

#include "interface.h"
#include "kernels.h"

namespace dcnv2 {
namespace {

using namespace nvinfer1;

constexpr char NAME[] = "DCNv2", VERSION[] = "1", NAMESPACE[] = "";
enum { X, OFFSET, MASK, WEIGHT, BIAS };
char const *const INPUTS[] = {"x", "offset", "mask", "weight", "bias"};

ILoggerFinder *logger_finder = nullptr;  // given by TensorRT when it loads the library

int32_t refuse(Message const &message) noexcept {
  char line[sizeof message.text + 16];
  snprintf(line, sizeof line, "%s: %s", NAME, message.text);
  ILogger *logger = logger_finder ? logger_finder->findLogger() : nullptr;
  if (logger)
    logger->log(ILogger::Severity::kERROR, line);
  else
    fprintf(stderr, "%s\n", line);
  return -1;
}

struct Settings {  // pairs are rows, columns
  int32_t stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1}, groups[1] = {1}, offset_groups[1] = {1};
};

struct Setting {
  char const *name;
  size_t place;
  int32_t length, least;
};
Setting const SETTINGS[] = {
    {"stride", offsetof(Settings, stride), 2, 1},
    {"padding", offsetof(Settings, padding), 2, 0},
    {"dilation", offsetof(Settings, dilation), 2, 1},
    {"groups", offsetof(Settings, groups), 1, 1},
    {"offset_groups", offsetof(Settings, offset_groups), 1, 1},
};
constexpr int COUNT = sizeof SETTINGS / sizeof *SETTINGS;

PluginField field(char const *name, void const *data, int32_t length) noexcept {
  PluginField f{};
  f.name = name, f.data = data, f.type = PluginFieldType::kINT32, f.length = length;
  return f;
}

bool read_field(PluginField const &given, Settings &settings, Message &message) noexcept {
  for (Setting const &each : SETTINGS) {
    if (!given.name || strcmp(given.name, each.name)) continue;
    if (given.type != PluginFieldType::kINT32 || given.length != each.length || !given.data)
      return message.failed("field %s: expected %d int32", each.name, each.length);
    auto const *values = static_cast<int32_t const *>(given.data);
    for (int i = 0; i < each.length; i++)
      if (values[i] < each.least)
        return message.failed("field %s: %d is less than %d", each.name, values[i], each.least);
    memcpy(reinterpret_cast<char *>(&settings) + each.place, values, sizeof(int32_t) * each.length);
    return true;
  }
  return message.failed("no field is called %s", given.name ? given.name : "nothing");
}

// Sizes that are not known yet, -1, pass.
bool same(int64_t a, int64_t b) noexcept { return a < 0 || b < 0 || a == b; }

bool check_shapes(Settings const &s, Dims const *const *dims, int32_t inputs, Message &message) noexcept {
  if (inputs != 4 && inputs != 5) return message.failed("%d inputs; expected x, offset, mask, weight and perhaps bias", inputs);
  for (int i = 0; i < inputs; i++) {
    int const rank = i == BIAS ? 1 : 4;
    if (dims[i]->nbDims != rank) return message.failed("%s has %d dimensions, not %d", INPUTS[i], dims[i]->nbDims, rank);
  }
  auto const *x = dims[X]->d, *offset = dims[OFFSET]->d, *mask = dims[MASK]->d, *weight = dims[WEIGHT]->d;
  for (int i = 0; i < 4; i++)
    if (weight[i] < 1) return message.failed("the shape of weight has to be known, and nothing in it 0");
  int64_t const groups = s.groups[0], taps = s.offset_groups[0] * weight[2] * weight[3];
  if (!same(x[1], weight[1] * groups))
    return message.failed("x has %lld channels, weight and groups make %lld", (long long)x[1], (long long)(weight[1] * groups));
  if (weight[0] % groups) return message.failed("%lld outputs, no multiple of %lld groups", (long long)weight[0], (long long)groups);
  if (weight[1] * groups % s.offset_groups[0])
    return message.failed("%lld channels, no multiple of %d offset_groups", (long long)(weight[1] * groups), s.offset_groups[0]);
  if (!same(offset[1], 2 * taps) || !same(mask[1], taps))
    return message.failed("offset and mask have %lld and %lld channels, not %lld and %lld", (long long)offset[1],
                          (long long)mask[1], (long long)(2 * taps), (long long)taps);
  if (!same(x[0], offset[0]) || !same(x[0], mask[0])) return message.failed("x, offset and mask differ in batch");
  for (int i = 0; i < 2; i++) {
    int64_t const reach = s.dilation[i] * (weight[2 + i] - 1) + 1, side = x[2 + i] + 2 * s.padding[i] - reach;
    int64_t const expected = x[2 + i] < 0 ? -1 : side < 0 ? 0 : side / s.stride[i] + 1;
    if (!same(offset[2 + i], expected) || !same(mask[2 + i], expected))
      return message.failed("offset and mask have %lld and %lld %s, x and weight make %lld", (long long)offset[2 + i],
                            (long long)mask[2 + i], i ? "columns" : "rows", (long long)expected);
  }
  if (inputs == 5 && !same(dims[BIAS]->d[0], weight[0]))
    return message.failed("bias has %lld values, not %lld", (long long)dims[BIAS]->d[0], (long long)weight[0]);
  return true;
}

Layer layer_of(Settings const &s, Dims const &weight) noexcept {
  auto const *d = weight.d;
  auto const outputs = static_cast<int32_t>(d[0]), group = static_cast<int32_t>(d[1]), channels = group * s.groups[0];
  Layer layer{};
  layer.C = channels, layer.N = outputs, layer.CG = group, layer.NG = outputs / s.groups[0];
  layer.CO = channels / s.offset_groups[0], layer.CS = std::gcd(layer.CG, layer.CO);
  layer.OG = s.offset_groups[0], layer.K = static_cast<int32_t>(d[2] * d[3]), layer.KW = static_cast<int32_t>(d[3]);
  layer.SH = s.stride[0], layer.SW = s.stride[1], layer.PH = s.padding[0], layer.PW = s.padding[1];
  layer.DH = s.dilation[0], layer.DW = s.dilation[1];
  return layer;
}

Sizes sizes_of(Dims const &x, Dims const &offset) noexcept { return {x.d[0], x.d[2], x.d[3], offset.d[2], offset.d[3]}; }

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
 public:
  explicit Plugin(Settings const &settings) noexcept : settings_(settings) {}

  // IPluginV3
  IPluginCapability *getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore *>(this);
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild *>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime *>(this);
    }
    return nullptr;
  }
  IPluginV3 *clone() noexcept override { return new (std::nothrow) Plugin(settings_); }

  // core
  AsciiChar const *getPluginName() const noexcept override { return NAME; }
  AsciiChar const *getPluginVersion() const noexcept override { return VERSION; }
  AsciiChar const *getPluginNamespace() const noexcept override { return NAMESPACE; }

  // build
  int32_t getNbOutputs() const noexcept override { return 1; }

  int32_t getOutputDataTypes(DataType *outputs, int32_t, DataType const *inputs, int32_t) const noexcept override {
    outputs[0] = inputs[X];
    return 0;
  }

  int32_t getOutputShapes(DimsExprs const *inputs, int32_t count, DimsExprs const *, int32_t, DimsExprs *outputs,
                          int32_t, IExprBuilder &) noexcept override {
    Message message;
    if (count < 4 || inputs[X].nbDims != 4 || inputs[OFFSET].nbDims != 4 || inputs[WEIGHT].nbDims != 4) {
      message.failed("expected x, offset, mask and weight of 4 dimensions each, and perhaps bias");
      return refuse(message);
    }
    outputs[0].nbDims = 4;
    outputs[0].d[0] = inputs[X].d[0], outputs[0].d[1] = inputs[WEIGHT].d[0];
    outputs[0].d[2] = inputs[OFFSET].d[2], outputs[0].d[3] = inputs[OFFSET].d[3];
    return 0;
  }

  bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const *all, int32_t inputs,
                                 int32_t) noexcept override {
    PluginTensorDesc const &own = all[position].desc, &x = all[X].desc;
    if (position == X) {
      if (own.type != DataType::kFLOAT && own.type != DataType::kHALF && own.type != DataType::kBF16) return false;
      if (own.format == TensorFormat::kLINEAR) return true;
      if (own.type == DataType::kFLOAT) return own.format == TensorFormat::kHWC;
      // eights of channels: without a remainder they are channels-last
      return own.format == TensorFormat::kHWC8 && own.dims.d[1] > 0 && own.dims.d[1] % 8 == 0 &&
             all[WEIGHT].desc.dims.d[0] % 8 == 0;
    }
    return own.type == x.type && own.format == (position == inputs ? x.format : TensorFormat::kLINEAR);
  }

  int32_t configurePlugin(DynamicPluginTensorDesc const *in, int32_t inputs, DynamicPluginTensorDesc const *,
                          int32_t) noexcept override {
    Dims const *dims[5] = {};
    for (int i = 0; i < inputs && i < 5; i++) dims[i] = &in[i].desc.dims;
    Message message;
    return check_shapes(settings_, dims, inputs, message) ? 0 : refuse(message);
  }

  size_t getWorkspaceSize(DynamicPluginTensorDesc const *in, int32_t, DynamicPluginTensorDesc const *,
                          int32_t) const noexcept override {
    auto const &x = in[X].desc;
    Layer const layer = layer_of(settings_, in[WEIGHT].desc.dims);
    Sizes const most = sizes_of(largest(in[X]), largest(in[OFFSET]));
    return Computation::workspace_bytes(layer, most, static_cast<Type>(x.type), x.format == TensorFormat::kLINEAR);
  }

  // runtime
  int32_t onShapeChange(PluginTensorDesc const *in, int32_t inputs, PluginTensorDesc const *, int32_t) noexcept override {
    Dims const *dims[5] = {};
    for (int i = 0; i < inputs && i < 5; i++) dims[i] = &in[i].dims;
    Message message;
    if (!check_shapes(settings_, dims, inputs, message)) return refuse(message);
    has_bias_ = inputs == 5;
    bool const linear = in[X].format == TensorFormat::kLINEAR;
    Layer const layer = layer_of(settings_, *dims[WEIGHT]);
    Sizes const sizes = sizes_of(*dims[X], *dims[OFFSET]);
    return computation_.prepare(layer, sizes, static_cast<Type>(in[X].type), linear, message) ? 0 : refuse(message);
  }

  int32_t enqueue(PluginTensorDesc const *, PluginTensorDesc const *, void const *const *inputs, void *const *outputs,
                  void *workspace, cudaStream_t stream) noexcept override {
    Tensors const tensors{inputs[X], inputs[OFFSET], inputs[MASK], inputs[WEIGHT], has_bias_ ? inputs[BIAS] : nullptr,
                          outputs[0], workspace};
    Message message;
    return computation_.run(tensors, stream, message) ? 0 : refuse(message);
  }

  IPluginV3 *attachToContext(IPluginResourceContext *) noexcept override { return clone(); }

  PluginFieldCollection const *getFieldsToSerialize() noexcept override {
    for (int i = 0; i < COUNT; i++) {
      char const *data = reinterpret_cast<char const *>(&settings_) + SETTINGS[i].place;
      fields_[i] = field(SETTINGS[i].name, data, SETTINGS[i].length);
    }
    collection_.nbFields = COUNT, collection_.fields = fields_;
    return &collection_;
  }

 private:
  static Dims const &largest(DynamicPluginTensorDesc const &tensor) noexcept {
    return tensor.max.nbDims == tensor.desc.dims.nbDims ? tensor.max : tensor.desc.dims;
  }

  Settings settings_;
  Computation computation_;
  bool has_bias_ = false;
  PluginField fields_[COUNT]{};
  PluginFieldCollection collection_{};
};

class Creator final : public IPluginCreatorV3One {
 public:
  Creator() noexcept {
    for (int i = 0; i < COUNT; i++) fields_[i] = field(SETTINGS[i].name, nullptr, SETTINGS[i].length);
    collection_.nbFields = COUNT, collection_.fields = fields_;
  }
  AsciiChar const *getPluginName() const noexcept override { return NAME; }
  AsciiChar const *getPluginVersion() const noexcept override { return VERSION; }
  AsciiChar const *getPluginNamespace() const noexcept override { return NAMESPACE; }
  PluginFieldCollection const *getFieldNames() noexcept override { return &collection_; }

  IPluginV3 *createPlugin(AsciiChar const *, PluginFieldCollection const *given, TensorRTPhase) noexcept override {
    Settings settings;
    Message message;
    for (int i = 0; given && i < given->nbFields; i++)
      if (!read_field(given->fields[i], settings, message)) {
        refuse(message);
        return nullptr;
      }
    return new (std::nothrow) Plugin(settings);
  }

 private:
  PluginField fields_[COUNT]{};
  PluginFieldCollection collection_{};
};

}  // namespace
}  // namespace dcnv2

#define EXPORTED extern "C" __attribute__((visibility("default")))

// The two functions that TensorRT looks for in a library of plugins.
EXPORTED void setLoggerFinder(nvinfer1::ILoggerFinder *finder) { dcnv2::logger_finder = finder; }

EXPORTED nvinfer1::IPluginCreatorInterface *const *getCreators(int32_t &count) {
  static dcnv2::Creator creator;
  static nvinfer1::IPluginCreatorInterface *const creators[] = {&creator};
  count = 1;
  return creators;
}
