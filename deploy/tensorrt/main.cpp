// A TensorRT engine (python -m deploy.tensorrt -s, or export.py --include engine) on a folder of pictures, without Python:
//     trt_detect -d best.engine images/
// For TensorRT 10 and later and TensorRT for RTX, whose headers are the user's: see deploy/cpp/CMakeLists.txt. An engine
// may hold compiled code: run only those that you made or trust.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "engine_file.h"
#include "fault.h"
#include "program.h"

namespace {

constexpr const char* kInput = "images";
constexpr const char* kOutput = "output0";

void check(cudaError_t code, const char* doing) {
    if (code != cudaSuccess) throw dcn::Fault(std::string(doing) + ": " + cudaGetErrorString(code));
}

// Keeps the last error of TensorRT, which is what a user can act on.
class Log : public nvinfer1::ILogger {
  public:
    void log(Severity severity, const char* text) noexcept override {
        if (severity > Severity::kERROR) return;
        try {
            last_ = text;
        } catch (...) {  // no memory for a message
        }
    }

    std::string last() const { return last_.empty() ? "no reason given" : last_.substr(0, last_.find('\n')); }

  private:
    std::string last_;
};

// Memory on the GPU that grows and is never copied.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { cudaFree(data_); }

    void* of(std::size_t bytes) {
        if (bytes > bytes_) {
            cudaFree(data_);
            data_ = nullptr;
            bytes_ = 0;
            check(cudaMalloc(&data_, bytes), "memory on the GPU");
            bytes_ = bytes;
        }
        return data_;
    }

  private:
    void* data_ = nullptr;
    std::size_t bytes_ = 0;
};

class Stream {
  public:
    Stream() { check(cudaStreamCreate(&stream_), "a stream on the GPU"); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    ~Stream() { cudaStreamDestroy(stream_); }
    cudaStream_t get() const { return stream_; }

  private:
    cudaStream_t stream_ = nullptr;
};

int attribute(cudaDeviceAttr what, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, what, device), "the GPU's compute capability");
    return value;
}

class EngineModel : public dcn::Model {
  public:
    explicit EngineModel(const dcn::Options& options) : path_(options.model), file_(dcn::read_engine(path_)) {
        const int device = device_of(options.device);
        check(cudaSetDevice(device), ("--device " + std::to_string(device)).c_str());
        refuse_other_gpu(device);
        stream_ = std::make_unique<Stream>();
        runtime_.reset(nvinfer1::createInferRuntime(log_));
        if (!runtime_) throw dcn::Fault("TensorRT cannot start (" + log_.last() + ")");
        load_plugin(options.plugin);
        engine_.reset(runtime_->deserializeCudaEngine(file_.engine.data(), file_.engine.size()));
        if (!engine_)
            throw dcn::Fault(path_ + ": " + file_.maker.text() + "; this TensorRT cannot open it (" + log_.last() +
                             "); build it again here with python -m deploy.tensorrt -s");
        std::vector<char>().swap(file_.engine);
        context_.reset(engine_->createExecutionContext());
        if (!context_)
            throw dcn::Fault(path_ + ": no room to run it (" + log_.last() + "); build it with a smaller --max-batch");
        refuse_other_tensors();
    }

    const dcn::Metadata& metadata() const override { return file_.meta; }

    int most() const override { return file_.meta.batch; }

    std::vector<float> run(const std::vector<float>& images, int count, int height, int width) override {
        const cudaStream_t stream = stream_->get();
        nvinfer1::Dims shape{};
        shape.nbDims = 4;
        const int sizes[] = {count, 3, height, width};
        std::copy(std::begin(sizes), std::end(sizes), shape.d);
        if (!context_->setInputShape(kInput, shape)) fail("refuses " + std::to_string(count) + " images of this size");
        const nvinfer1::Dims given = context_->getTensorShape(kOutput);
        std::size_t values = 1;
        for (int i = 0; i < given.nbDims; ++i) {
            if (given.d[i] <= 0) fail("does not say how much it gives");
            values *= static_cast<std::size_t>(given.d[i]);
        }
        void* input = input_.of(images.size() * sizeof(float));
        void* output = output_.of(values * sizeof(float));
        check(cudaMemcpyAsync(input, images.data(), images.size() * sizeof(float), cudaMemcpyHostToDevice, stream), "copying to the GPU");
        if (!context_->setTensorAddress(kInput, input) || !context_->setTensorAddress(kOutput, output)) fail("takes no addresses");
        if (!context_->enqueueV3(stream)) fail("failed");
        std::vector<float> predictions(values);
        check(cudaMemcpyAsync(predictions.data(), output, values * sizeof(float), cudaMemcpyDeviceToHost, stream), "copying from the GPU");
        check(cudaStreamSynchronize(stream), "running the engine");
        return predictions;
    }

  private:
    static int device_of(const std::string& asked) {
        if (asked.empty() || asked == "cuda") return 0;
        if (asked.size() > 3 || asked.find_first_not_of("0123456789") != std::string::npos)
            throw dcn::Fault("--device " + asked + ": an engine runs on an NVIDIA GPU; expected 0, 1, ...");
        return std::atoi(asked.c_str());
    }

    // The library that --plugin names, or the one that the file asks for, which lies beside it.
    void load_plugin(const std::string& asked) {
        if (asked.empty() && file_.maker.plugin.empty()) return;
        const auto beside = std::filesystem::absolute(path_).parent_path() / file_.maker.plugin;
        const std::string library = asked.empty() ? beside.string() : asked;
        if (!std::filesystem::is_regular_file(library))
            throw dcn::Fault(library + ": no such plugin library, which " + path_ + " needs; name it with --plugin");
        if (!runtime_->getPluginRegistry().loadLibrary(library.c_str()))
            throw dcn::Fault(library + ": TensorRT cannot load this plugin library (" + log_.last() + ")");
    }

    void refuse_other_gpu(int device) const {
        const auto& targets = file_.maker.targets;
        const int here = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                         attribute(cudaDevAttrComputeCapabilityMinor, device);
        if (targets.empty() || std::find(targets.begin(), targets.end(), here) != targets.end()) return;
        throw dcn::Fault(path_ + ": " + file_.maker.text() + "; this GPU has " + std::to_string(here / 10) + "." +
                         std::to_string(here % 10) + "; build it again here with python -m deploy.tensorrt -s");
    }

    void refuse_other_tensors() const {
        for (const char* name : {kInput, kOutput})
            if (engine_->getTensorDataType(name) != nvinfer1::DataType::kFLOAT)
                throw dcn::Fault(path_ + ": has no float32 tensor " + name + "; build it with python -m deploy.tensorrt -s");
    }

    [[noreturn]] void fail(const std::string& what) const {
        throw dcn::Fault(path_ + ": the engine " + what + " (" + log_.last() + ")");
    }

    // destroyed from the last to the first: the context before its engine, the engine before its runtime
    std::string path_;
    dcn::EngineFile file_;
    Log log_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    std::unique_ptr<Stream> stream_;
    Buffer input_, output_;
};

}  // namespace

int main(int count, char** words) {
    return dcn::run_program(count, words, "trt_detect", "MODEL.engine", [](const dcn::Options& options) {
        return std::make_unique<EngineModel>(options);
    });
}
