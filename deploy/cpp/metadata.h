// What travels inside an exported file (deploy/metadata.py): each entry is a JSON text by itself.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace dcn {

struct Metadata {
    std::vector<std::string> names;  // of the classes
    int stride = 32;                 // sides of the input are multiples of it
    int height = 0, width = 0;       // the size it was made for
    int batch = 1;                   // images at once
    bool dynamic = false;            // takes any size and batch
    bool half = false;               // float16 weights
};

// Throws Fault, naming `source`, for entries that are missing or cannot be.
Metadata parse_metadata(const std::map<std::string, std::string>& entries, const std::string& source);

// What built an engine: the Python module, its version, the compute capabilities that it is for (89: 8.9), and the name
// of the library of plugins that it needs, which lies beside it, empty for none.
struct Maker {
    std::string module, version, plugin;
    std::vector<int> targets;

    std::string text() const;
};

Maker parse_maker(const std::string& json, const std::string& source);

// A JSON object whose values are all texts. Throws Fault, naming `source`.
std::map<std::string, std::string> parse_texts(const std::string& json, const std::string& source);

}  // namespace dcn
