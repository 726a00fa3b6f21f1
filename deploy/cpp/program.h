// The program around a model: pictures of a folder through it, results written. What differs between runtimes is behind
// Model.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "metadata.h"
#include "options.h"

namespace dcn {

class Model {
  public:
    virtual ~Model() = default;
    virtual const Metadata& metadata() const = 0;
    // The most images at once.
    virtual int most() const = 0;
    // images: `count` x 3 x height x width floats in 0..1; returns count x rows x (5 + classes) predictions.
    virtual std::vector<float> run(const std::vector<float>& images, int count, int height, int width) = 0;
};

using Opener = std::function<std::unique_ptr<Model>(const Options&)>;

// Everything that main() does: flags, model, pictures, one line on a fault. Returns the exit status: 0 all read, 1
// something could not be read (the others were), 2 wrong input.
int run_program(int count, char** words, const std::string& program, const std::string& model, const Opener& open);

// The predictions of a model must be what it says: throws Fault, naming `source`, for another number of values. Returns
// the rows of an image.
std::int64_t rows_of(std::size_t values, int count, int classes, const std::string& source);

}  // namespace dcn
