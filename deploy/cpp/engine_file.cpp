#include "engine_file.h"

#include <filesystem>
#include <fstream>

#include "fault.h"

namespace dcn {
namespace {

constexpr std::size_t kLength = 4, kMaxText = 8000000;  // bytes of the header: 100,000 class names with room to spare

}  // namespace

EngineFile read_engine(const std::string& path) {
    std::error_code error;
    const std::uintmax_t size = std::filesystem::file_size(path, error);
    std::ifstream file(path, std::ios::binary);
    if (error || !file) throw Fault(path + ": cannot be read");
    unsigned char length_bytes[kLength] = {};
    file.read(reinterpret_cast<char*>(length_bytes), kLength);
    std::size_t length = 0;
    for (std::size_t i = kLength; i-- > 0;) length = length << 8 | length_bytes[i];
    if (!file || length == 0 || length > kMaxText || kLength + length > size)
        throw Fault(path + ": no header of class names and sizes; was it built by python -m deploy.tensorrt?");
    std::string text(length, '\0');
    file.read(text.data(), static_cast<std::streamsize>(length));
    const auto entries = parse_texts(text, path);
    const auto builder = entries.find("builder");
    if (builder == entries.end())
        throw Fault(path + ": does not say what built it; was it built by python -m deploy.tensorrt?");
    EngineFile found{parse_metadata(entries, path), parse_maker(builder->second, path), {}};
    found.engine.resize(static_cast<std::size_t>(size) - kLength - length);
    if (found.engine.empty()) throw Fault(path + ": cut short: no engine behind its header");
    if (!file.read(found.engine.data(), static_cast<std::streamsize>(found.engine.size())))
        throw Fault(path + ": cannot be read to its end");
    return found;
}

}  // namespace dcn
