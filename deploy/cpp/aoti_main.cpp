// A package of AOTInductor (export.py --include aoti, best.pt2) on a folder of pictures, without Python:
//     aoti_detect -d best.pt2 images/
// The package is a program: run only those that you made or trust.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstring>

#include "fault.h"
#include "program.h"

namespace {

using torch::inductor::AOTIModelPackageLoader;

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')).substr(0, 200); }

class PackageModel : public dcn::Model {
  public:
    explicit PackageModel(const dcn::Options& options) : path_(options.model), device_(device_of(options)) {
        if (!options.plugin.empty()) throw dcn::Fault("--plugin: for engines of TensorRT; a package needs none");
        try {
            at::empty({1}, device_);  // starts CUDA, which a package takes for granted
            loader_ = std::make_unique<AOTIModelPackageLoader>(path_, "model", false, 1, device_.index());
        } catch (const c10::Error& error) {
            throw dcn::Fault(path_ + ": cannot be opened on " + device_.str() + " (" + first_line(error.what_without_backtrace()) + ")");
        }
        const auto found = loader_->get_metadata();
        meta_ = dcn::parse_metadata({found.begin(), found.end()}, path_);
    }

    const dcn::Metadata& metadata() const override { return meta_; }

    int most() const override { return meta_.dynamic ? 1 << 20 : meta_.batch; }

    std::vector<float> run(const std::vector<float>& images, int count, int height, int width) override {
        const int taken = meta_.dynamic ? count : meta_.batch;  // a last batch is filled up
        at::Tensor input = at::zeros({taken, 3, height, width}, at::kFloat);
        std::memcpy(input.data_ptr<float>(), images.data(), images.size() * sizeof(float));
        input = input.to(device_, meta_.half ? at::kHalf : at::kFloat);
        std::vector<at::Tensor> outputs;
        try {
            outputs = loader_->run({input});
        } catch (const c10::Error& error) {
            throw dcn::Fault(path_ + ": failed (" + first_line(error.what_without_backtrace()) + ")");
        }
        if (outputs.size() != 1 || outputs[0].dim() != 3 || outputs[0].size(0) != taken)
            throw dcn::Fault(path_ + ": gives something else than predictions; export it again");
        const at::Tensor own = outputs[0].narrow(0, 0, count).to(at::kCPU, at::kFloat).contiguous();
        return {own.data_ptr<float>(), own.data_ptr<float>() + own.numel()};
    }

  private:
    // The device that the package was compiled for; --device may choose among several GPUs.
    static at::Device device_of(const dcn::Options& options) {
        std::string kind;
        try {
            const auto told = AOTIModelPackageLoader::load_metadata_from_package(options.model, "model");
            const auto found = told.find("AOTI_DEVICE_KEY");
            kind = found == told.end() ? "cpu" : found->second;
        } catch (const std::exception&) {
            throw dcn::Fault(options.model + ": not a package of export.py");
        }
        const std::string& asked = options.device;
        const bool number = !asked.empty() && asked.find_first_not_of("0123456789") == std::string::npos;
        if (!asked.empty() && !number && asked != "cpu" && asked != "cuda")
            throw dcn::Fault("--device " + asked + ": expected cpu, 0, 1, ...");
        if (!asked.empty() && (asked == "cpu") != (kind == "cpu"))
            throw dcn::Fault(options.model + ": compiled for " + kind + ", and --device is " + asked + "; export it again");
        if (kind == "cpu") return at::Device(at::kCPU);
        if (kind != "cuda") throw dcn::Fault(options.model + ": compiled for " + kind + ", which this program does not know");
        if (!at::hasCUDA()) throw dcn::Fault(options.model + ": compiled for a GPU, and there is none here");
        return at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(number ? std::stoi(asked.substr(0, 3)) : 0));
    }

    std::string path_;
    at::Device device_;
    dcn::Metadata meta_;
    std::unique_ptr<AOTIModelPackageLoader> loader_;
};

}  // namespace

int main(int count, char** words) {
    return dcn::run_program(count, words, "aoti_detect", "MODEL.pt2", [](const dcn::Options& options) {
        return std::make_unique<PackageModel>(options);
    });
}
