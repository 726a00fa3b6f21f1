// Plays TensorRT for one plugin: finds it in TensorRT's own registry and calls it in the order in which a build and an
// engine would. Called from Python (harness.py), where the tensors are torch's. What an engine does around it, choosing
// formats and fusing layers, is not here.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "interface.h"

using namespace nvinfer1;

#ifdef DCNV2_TENSORRT_HEADERS
using Registry = IPluginRegistry;
#else
// Of TensorRT 11, which has no functions for older kinds of plugins in front any more. Only the order counts: what is
// not called here has no types.
class Registry {
 protected:
  virtual ~Registry() = default;

 public:
  virtual void setErrorRecorder() = 0;
  virtual void getErrorRecorder() = 0;
  virtual void isParentSearchEnabled() = 0;
  virtual void setParentSearchEnabled() = 0;
  virtual void *loadLibrary(AsciiChar const *path) noexcept = 0;
  virtual void deregisterLibrary(void *) noexcept = 0;
  virtual bool registerCreator(IPluginCreatorInterface &, AsciiChar const *space) noexcept = 0;
  virtual IPluginCreatorInterface *const *getAllCreators(int32_t *count) const noexcept = 0;
  virtual IPluginCreatorInterface *getCreator(AsciiChar const *name, AsciiChar const *version,
                                              AsciiChar const *space) noexcept = 0;
};
#endif

namespace {

constexpr int INPUTS = 5;
int const RANKS[] = {4, 4, 4, 4, 1};

struct Shapes {  // of x, offset, mask, weight, bias and the output; numbers of TensorRT's types and formats
  int64_t dims[INPUTS + 1][4];
  int32_t inputs, type, format;
};

PluginTensorDesc describe(Shapes const &s, int number) {
  PluginTensorDesc d{};
  bool const linear = number > 0 && number < INPUTS;
  d.dims.nbDims = number == INPUTS ? 4 : RANKS[number];
  for (int i = 0; i < d.dims.nbDims; i++) d.dims.d[i] = s.dims[number][i];
  d.type = static_cast<DataType>(s.type);
  d.format = linear ? TensorFormat::kLINEAR : static_cast<TensorFormat>(s.format);
  d.scale = 1.f;
  return d;
}

struct Descriptions {  // inputs, then the output
  PluginTensorDesc fixed[INPUTS + 1];
  DynamicPluginTensorDesc dynamic[INPUTS + 1];
  Descriptions(Shapes const &s) {
    for (int i = 0; i <= s.inputs; i++) {
      fixed[i] = describe(s, i == s.inputs ? INPUTS : i);
      dynamic[i].desc = fixed[i];
      dynamic[i].min = dynamic[i].max = dynamic[i].opt = fixed[i].dims;
    }
  }
};

template <class Part>
Part *part(void *plugin, PluginCapabilityType type) {
  return static_cast<Part *>(static_cast<IPluginV3 *>(plugin)->getCapabilityInterface(type));
}
IPluginV3OneBuild *build_part(void *p) { return part<IPluginV3OneBuild>(p, PluginCapabilityType::kBUILD); }
IPluginV3OneRuntime *run_part(void *p) { return part<IPluginV3OneRuntime>(p, PluginCapabilityType::kRUNTIME); }

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// The creator that the registry of `tensorrt` (a library of TensorRT's) has after loading `library`, or without one the
// library's own; null where there is none.
EXPORTED void *find_creator(char const *tensorrt, char const *library, char const *name) {
  void *handle = dlopen(tensorrt ? tensorrt : library, RTLD_NOW | (tensorrt ? RTLD_GLOBAL : RTLD_LOCAL));
  if (!handle) {
    fprintf(stderr, "%s\n", dlerror());
    return nullptr;
  }
  IPluginCreatorInterface *found = nullptr;
  if (tensorrt) {
    auto get = reinterpret_cast<Registry *(*)()>(dlsym(handle, "getPluginRegistry"));
    Registry *registry = get ? get() : nullptr;
    if (registry && registry->loadLibrary(library)) found = registry->getCreator(name, "1", "");
  } else {
    auto get = reinterpret_cast<IPluginCreatorInterface *const *(*)(int32_t &)>(dlsym(handle, "getCreators"));
    int32_t count = 0;
    if (get) found = get(count)[0];
  }
  if (!found || strcmp(found->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE")) return nullptr;
  return static_cast<IPluginCreatorV3One *>(found);
}

EXPORTED void *create(void *creator, PluginField const *fields, int32_t count, int32_t phase) {
  PluginFieldCollection collection{};
  collection.nbFields = count, collection.fields = fields;
  return static_cast<IPluginCreatorV3One *>(creator)->createPlugin("layer", &collection,
                                                                   static_cast<TensorRTPhase>(phase));
}

EXPORTED PluginFieldCollection const *serialized(void *plugin) { return run_part(plugin)->getFieldsToSerialize(); }

EXPORTED PluginFieldCollection const *field_names(void *creator) {
  return static_cast<IPluginCreatorV3One *>(creator)->getFieldNames();
}

EXPORTED void *attach(void *plugin) { return run_part(plugin)->attachToContext(nullptr); }
EXPORTED void *cloned(void *plugin) { return static_cast<IPluginV3 *>(plugin)->clone(); }
EXPORTED void destroy(void *plugin) { delete static_cast<IPluginV3 *>(plugin); }

// Whether position `number` may have its type and format, the others having theirs.
EXPORTED int32_t supports(void *plugin, Shapes const *s, int32_t const *types, int32_t const *formats, int32_t number) {
  Descriptions d(*s);
  for (int i = 0; i <= s->inputs; i++) {
    d.dynamic[i].desc.type = static_cast<DataType>(types[i]);
    d.dynamic[i].desc.format = static_cast<TensorFormat>(formats[i]);
  }
  return build_part(plugin)->supportsFormatCombination(number, d.dynamic, s->inputs, 1);
}

EXPORTED int32_t configure(void *plugin, Shapes const *s) {
  Descriptions d(*s);
  return build_part(plugin)->configurePlugin(d.dynamic, s->inputs, d.dynamic + s->inputs, 1);
}

EXPORTED int64_t workspace_bytes(void *plugin, Shapes const *s) {
  Descriptions d(*s);
  return static_cast<int64_t>(build_part(plugin)->getWorkspaceSize(d.dynamic, s->inputs, d.dynamic + s->inputs, 1));
}

EXPORTED int32_t shape_change(void *plugin, Shapes const *s) {
  Descriptions d(*s);
  return run_part(plugin)->onShapeChange(d.fixed, s->inputs, d.fixed + s->inputs, 1);
}

EXPORTED int32_t enqueue(void *plugin, Shapes const *s, void const *const *inputs, void *output, void *workspace,
                         void *stream) {
  Descriptions d(*s);
  void *outputs[] = {output};
  return run_part(plugin)->enqueue(d.fixed, d.fixed + s->inputs, inputs, outputs, workspace,
                                   static_cast<cudaStream_t>(stream));
}
