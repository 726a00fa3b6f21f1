// Pictures without a library: binary .ppm in and out, rectangles without texts. For builds without OpenCV, and for tests.
#include <algorithm>
#include <cctype>
#include <filesystem>
#include <fstream>

#include "fault.h"
#include "picture.h"

namespace dcn {
namespace {

constexpr int kMaxSide = 1 << 20;
constexpr long long kMaxPixels = 178956970;  // as utils/images.py

// The next number of a header; comments run from # to the end of the line.
int number(std::istream& file) {
    while (file >> std::ws && file.peek() == '#') file.ignore(1 << 20, '\n');
    int value = -1;
    return file >> value ? value : -1;
}

}  // namespace

bool is_picture(const std::string& path) {
    std::string suffix = std::filesystem::path(path).extension().string();
    std::transform(suffix.begin(), suffix.end(), suffix.begin(), [](unsigned char c) { return std::tolower(c); });
    return suffix == ".ppm";
}

Picture read_picture(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw Fault(path + ": cannot be read");
    char magic[2] = {};
    file.read(magic, 2);
    if (magic[0] != 'P' || magic[1] != '6')
        throw Fault(path + ": no binary .ppm, which is all that this build reads; build with OpenCV for others");
    const int width = number(file), height = number(file), most = number(file);
    if (width < 1 || height < 1 || width > kMaxSide || height > kMaxSide || most != 255 ||
        static_cast<long long>(width) * height > kMaxPixels)
        throw Fault(path + ": a size that cannot be, or not 8 bits a value");
    file.get();
    Picture picture(height, width);
    const auto size = static_cast<std::streamsize>(picture.pixels.size());
    if (!file.read(reinterpret_cast<char*>(picture.pixels.data()), size)) throw Fault(path + ": cut short; copy it again");
    return picture;
}

// As OpenCV draws rectangles: lines of an odd number of pixels, round corners.
void draw(Picture& picture, const std::vector<Mark>& marks, int line_width) {
    const int reach = line_width == 1 ? 0 : (line_width + 1) / 2;
    for (const Mark& mark : marks) {
        const auto outside = [](int at, int low, int high) { return std::max({low - at, at - high, 0}); };
        for (int y = std::max(mark.y1 - reach, 0); y <= std::min(mark.y2 + reach, picture.height - 1); ++y)
            for (int x = std::max(mark.x1 - reach, 0); x <= std::min(mark.x2 + reach, picture.width - 1); ++x) {
                const int dx = outside(x, mark.x1, mark.x2), dy = outside(y, mark.y1, mark.y2);
                const int inside = std::min({x - mark.x1, mark.x2 - x, y - mark.y1, mark.y2 - y});
                if (inside > reach || dx * dx + dy * dy > reach * reach) continue;
                std::uint8_t* pixel = picture.row(y) + 3 * x;
                pixel[0] = mark.colour.red, pixel[1] = mark.colour.green, pixel[2] = mark.colour.blue;
            }
    }
}

std::string suffix_for(const std::string&) { return ".ppm"; }

void write_picture(const std::string& path, const Picture& picture) {
    const std::string part = path + ".part";
    {
        std::ofstream file(part, std::ios::binary);
        file << "P6\n" << picture.width << ' ' << picture.height << "\n255\n";
        file.write(reinterpret_cast<const char*>(picture.pixels.data()), static_cast<std::streamsize>(picture.pixels.size()));
        if (!file.flush()) throw Fault(path + ": cannot be written; see --project");
    }
    std::filesystem::rename(part, path);
}

}  // namespace dcn
