// For the test that compiles deploy/tensorrt/main.cpp where there is no TensorRT: the names and signatures that it uses,
// written from the public API reference of TensorRT 10. Not the vendor's header, and good for nothing but checking syntax:
// the order of the virtual functions is not theirs.
#pragma once

#include <cstddef>
#include <cstdint>

using cudaStream_t = struct CUstream_st*;

namespace nvinfer1 {

enum class DataType : std::int32_t { kFLOAT = 0, kHALF = 1 };

struct Dims {
    std::int32_t nbDims;
    std::int64_t d[8];
};

class ILogger {
  public:
    enum class Severity : std::int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual void log(Severity severity, const char* text) noexcept = 0;
    virtual ~ILogger() = default;
};

class IPluginRegistry {
  public:
    using PluginLibraryHandle = void*;
    virtual PluginLibraryHandle loadLibrary(const char* path) noexcept = 0;

  protected:
    virtual ~IPluginRegistry() = default;
};

class IExecutionContext {
  public:
    virtual ~IExecutionContext() noexcept = default;
    bool setInputShape(const char* name, const Dims& shape) noexcept;
    Dims getTensorShape(const char* name) const noexcept;
    bool setTensorAddress(const char* name, void* data) noexcept;
    bool enqueueV3(cudaStream_t stream) noexcept;
};

class ICudaEngine {
  public:
    virtual ~ICudaEngine() noexcept = default;
    IExecutionContext* createExecutionContext() noexcept;
    DataType getTensorDataType(const char* name) const noexcept;
};

class IRuntime {
  public:
    virtual ~IRuntime() noexcept = default;
    ICudaEngine* deserializeCudaEngine(const void* data, std::size_t size) noexcept;
    IPluginRegistry& getPluginRegistry() noexcept;
};

IRuntime* createInferRuntime(ILogger& logger) noexcept;

}  // namespace nvinfer1
