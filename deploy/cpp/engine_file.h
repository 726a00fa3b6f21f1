// The .engine file of deploy/tensorrt/engine_file.py: 4 bytes, little-endian, the length of a JSON text; the text; the
// engine as TensorRT serialised it.
#pragma once

#include <string>
#include <vector>

#include "metadata.h"

namespace dcn {

struct EngineFile {
    Metadata meta;
    Maker maker;
    std::vector<char> engine;
};

// Throws Fault for a file without this header, damaged or cut short within it.
EngineFile read_engine(const std::string& path);

}  // namespace dcn
