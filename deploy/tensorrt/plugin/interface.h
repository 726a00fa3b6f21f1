// What a plugin sees of TensorRT: declarations of our own, so that it compiles where TensorRT's headers are not.
// They follow the plugin interface of TensorRT 11.1 (IPluginV3, IPluginCreatorV3One), which 10.x and TensorRT for RTX
// 1.7 share: the order of virtual functions and of members is all that counts. With -D DCNV2_TENSORRT_HEADERS the same
// sources compile against NvInferRuntime.h.
#pragma once

#ifdef DCNV2_TENSORRT_HEADERS
#include <NvInferRuntime.h>
#else

#include <cstddef>
#include <cstdint>

struct CUstream_st;
using cudaStream_t = CUstream_st *;

namespace nvinfer1 {

using AsciiChar = char;

enum class APILanguage : int32_t { kCPP = 0 };
enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT32 = 3, kBF16 = 7 };
enum class TensorFormat : int32_t { kLINEAR = 0, kHWC8 = 2, kHWC = 8 };
enum class PluginFieldType : int32_t { kFLOAT32 = 1, kINT32 = 5, kCHAR = 6, kINT64 = 10 };
enum class PluginCapabilityType : int32_t { kCORE = 0, kBUILD = 1, kRUNTIME = 2 };
enum class TensorRTPhase : int32_t { kBUILD = 0, kRUNTIME = 1 };

class Dims64 {
 public:
  static constexpr int32_t MAX_DIMS = 8;
  int32_t nbDims;
  int64_t d[MAX_DIMS];
};
using Dims = Dims64;

class IDimensionExpr;
class IExprBuilder;
class IPluginResourceContext;

struct DimsExprs {
  int32_t nbDims;
  IDimensionExpr const *d[Dims::MAX_DIMS];
};

struct PluginTensorDesc {
  Dims dims;
  DataType type;
  TensorFormat format;
  float scale;
};

struct DynamicPluginTensorDesc {
  PluginTensorDesc desc;
  Dims min, max, opt;
};

struct PluginField {
  AsciiChar const *name;
  void const *data;
  PluginFieldType type;
  int32_t length;
};

struct PluginFieldCollection {
  int32_t nbFields;
  PluginField const *fields;
};

struct InterfaceInfo {
  AsciiChar const *kind;
  int32_t major, minor;
};

class IVersionedInterface {
 public:
  virtual APILanguage getAPILanguage() const noexcept { return APILanguage::kCPP; }
  virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
  virtual ~IVersionedInterface() noexcept = default;
};

class IPluginCapability : public IVersionedInterface {};

class IPluginV3 : public IVersionedInterface {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN", 1, 0}; }
  virtual IPluginCapability *getCapabilityInterface(PluginCapabilityType) noexcept = 0;
  virtual IPluginV3 *clone() noexcept = 0;
};

class IPluginV3OneCore : public IPluginCapability {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_CORE", 1, 0}; }
  virtual AsciiChar const *getPluginName() const noexcept = 0;
  virtual AsciiChar const *getPluginVersion() const noexcept = 0;
  virtual AsciiChar const *getPluginNamespace() const noexcept = 0;
};

class IPluginV3OneBuild : public IPluginCapability {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 1, 0}; }
  virtual int32_t configurePlugin(DynamicPluginTensorDesc const *in, int32_t ins, DynamicPluginTensorDesc const *out,
                                  int32_t outs) noexcept = 0;
  virtual int32_t getOutputDataTypes(DataType *outputs, int32_t outs, DataType const *inputs,
                                     int32_t ins) const noexcept = 0;
  virtual int32_t getOutputShapes(DimsExprs const *inputs, int32_t ins, DimsExprs const *shape_inputs,
                                  int32_t shape_ins, DimsExprs *outputs, int32_t outs, IExprBuilder &) noexcept = 0;
  virtual bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const *in_out, int32_t ins,
                                         int32_t outs) noexcept = 0;
  virtual int32_t getNbOutputs() const noexcept = 0;
  virtual size_t getWorkspaceSize(DynamicPluginTensorDesc const *, int32_t, DynamicPluginTensorDesc const *,
                                  int32_t) const noexcept {
    return 0;
  }
  virtual int32_t getValidTactics(int32_t *, int32_t) noexcept { return 0; }
  virtual int32_t getNbTactics() noexcept { return 0; }
  virtual char const *getTimingCacheID() noexcept { return nullptr; }
  virtual int32_t getFormatCombinationLimit() noexcept { return 100; }
  virtual char const *getMetadataString() noexcept { return nullptr; }
};

class IPluginV3OneRuntime : public IPluginCapability {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_RUNTIME", 1, 0}; }
  virtual int32_t setTactic(int32_t) noexcept { return 0; }
  virtual int32_t onShapeChange(PluginTensorDesc const *in, int32_t ins, PluginTensorDesc const *out,
                                int32_t outs) noexcept = 0;
  virtual int32_t enqueue(PluginTensorDesc const *in_descs, PluginTensorDesc const *out_descs,
                          void const *const *inputs, void *const *outputs, void *workspace,
                          cudaStream_t) noexcept = 0;
  virtual IPluginV3 *attachToContext(IPluginResourceContext *) noexcept = 0;
  virtual PluginFieldCollection const *getFieldsToSerialize() noexcept = 0;
};

class IPluginCreatorInterface : public IVersionedInterface {};

class IPluginCreatorV3One : public IPluginCreatorInterface {
 public:
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN CREATOR_V3ONE", 1, 0}; }
  virtual IPluginV3 *createPlugin(AsciiChar const *name, PluginFieldCollection const *,
                                  TensorRTPhase) noexcept = 0;
  virtual PluginFieldCollection const *getFieldNames() noexcept = 0;
  virtual AsciiChar const *getPluginName() const noexcept = 0;
  virtual AsciiChar const *getPluginVersion() const noexcept = 0;
  virtual AsciiChar const *getPluginNamespace() const noexcept = 0;
};

class ILogger {
 public:
  enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
  virtual void log(Severity, AsciiChar const *) noexcept = 0;
  virtual ~ILogger() = default;
};

class ILoggerFinder {
 public:
  virtual ILogger *findLogger() = 0;

 protected:
  virtual ~ILoggerFinder() = default;
};

}  // namespace nvinfer1
#endif
